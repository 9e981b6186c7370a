"""Paths, symbols and patterns for make_data.py: pools of parts, and the random draws from them."""

import random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


FOLDERS = _words("""
    src app lib core api web server client tools scripts plugins models views utils auth db cli
    docs config jobs tasks workers handlers routes common shared engine parser render storage
    network cache queue mail search admin reports events media forms hooks migrations middleware
    templates users orders items game audio video graph math data pipeline etl training inference
    deploy cloud site shop blog
""")
STEMS = _words("""
    main app index server client user account session token login cart order product stock price
    report chart table export import_csv reader writer loader dumper parser lexer scanner
    formatter printer settings config constants errors types schema model view router handler
    worker scheduler queue task job event message email sms notifier logger metrics tracer
    profiler cache store index_builder search ranking filter sorter graph tree node edge matrix
    vector tensor layer optimizer trainer dataset sampler batch image video audio player camera
    sensor motor robot map route weather clock calendar timer alarm recipe menu kitchen garden zoo
    library music movie ticket seat flight hotel car bike train backup restore archive compress
    encrypt hash random colors shapes geometry physics anchor badge basket beacon bottle bridge
    bucket candle canvas castle circuit coupon desert dolphin engine falcon forest fountain galaxy
    glacier hammer helmet hospital island jacket jungle ladder lantern magnet mirror mountain needle
    ocean pencil pepper pillow planet pocket puzzle rabbit ribbon rocket saddle salad school shadow
    signal silver spider station sunset teacher temple thunder tunnel violin volcano window
""")
TOP_FILES = _words("""
    README.md pyproject.toml Makefile setup.cfg CHANGELOG.md Dockerfile notes.txt LICENSE tox.ini
    index.html
""")
VERBS = _words("""
    get set load save read write parse build make create delete update fetch send receive open
    close start stop check find sort merge split count compute render draw print format encode
    decode validate convert apply register resolve collect filter join push pull
""")
NOUNS = _words("""
    user account order item price token session config report page image file line word row column
    table query message event task job user_id header body request response result error date time
    path url key value node tree graph batch score label index buffer cache queue color shape
    point menu button form field
""")
CLASS_HEADS = _words("""
    User Account Order Item Price Token Session Config Report Page Image File Line Query Message
    Event Task Job Request Response Result Cache Queue Graph Tree Node Batch Score Label Index
    Buffer Color Shape Menu Form Audio Video Http Json Csv Data Model
""")
CLASS_TAILS = _words("""
    Manager Handler Loader Builder Parser Writer Reader Store Factory Service Client Server Error
    View Worker Queue Filter Formatter Encoder Decoder Validator Registry Router Context State
    Adapter
""")
PATTERN_WORDS = _words("""
    TODO FIXME HACK XXX DEPRECATED password secret localhost timeout retry deprecated legacy debug
    verbose copyright license version warning traceback NotImplementedError KeyError ValueError
    lambda async await yield global assert breakpoint sleep print eval exec pickle subprocess
    threading numpy pandas flask django redis postgres docker kubernetes
""")
PATTERN_PHRASES = _lines("""
    import os
    import json
    import re
    from typing import
    def main
    class Meta
    raise Exception
    return None
    if debug
    except Exception
    while True
    not implemented
    permission denied
    file not found
    connection refused
    invalid user
    access token
    max retries
    os.environ
    sys.exit
    time.sleep
    logging.info
    logger.warning
    self.client
    request.user
    app.run
    np.zeros
    random.seed
    print(
    open(
    eval(
    TODO(anna)
    http://
    api_key
    user_id
    created_at
    is_active
    MAX_SIZE
    DEFAULT_PORT
    BASE_URL
    type: ignore
    pragma: no cover
""")
CODE_SUFFIXES = _words(".py .py .py .py .py .ts .ts .js .rs")
TEXT_SUFFIXES = _words(".py .py .md .toml .yaml .json .txt .cfg .ts .sh .html .css")


def folder(rng: random.Random) -> str:
    """One or two folder names joined by slashes, mostly with a slash at the end."""
    parts = rng.sample(FOLDERS, rng.choice((1, 1, 2)))
    return "/".join(parts) + rng.choice(("/", "/", ""))


def file_in(rng: random.Random, suffixes: tuple[str, ...]) -> str:
    """A file path of zero to two folders, a stem and one of the suffixes."""
    parts = rng.sample(FOLDERS, rng.choice((0, 1, 1, 1, 1, 2)))
    stem = rng.choice(STEMS)
    if rng.random() < 0.15:
        stem = f"{rng.choice(NOUNS)}_{stem}"
    return "/".join([*parts, stem + rng.choice(suffixes)])


def tests_path(rng: random.Random) -> str:
    """A test file, a test folder, or any folder."""
    stem = rng.choice((rng.choice(STEMS), f"{rng.choice(VERBS)}_{rng.choice(STEMS)}"))
    part = rng.choice(FOLDERS)
    return rng.choice(
        (
            f"tests/test_{stem}.py",
            f"tests/{part}/test_{stem}.py",
            f"{part}/test_{stem}.py",
            f"tests/{part}/",
            f"{part}/tests/",
            folder(rng),
        )
    )


def symbol(rng: random.Random) -> str:
    """A function, class, method or constant name."""
    verb, noun, other = rng.choice(VERBS), rng.choice(NOUNS), rng.choice(NOUNS)
    name = rng.choice(CLASS_HEADS) + rng.choice(CLASS_TAILS)
    return rng.choice(
        (
            f"{verb}_{noun}",
            f"{verb}_{noun}_{other}",
            name,
            name,
            f"{name}.{verb}",
            f"{name}.{verb}_{noun}",
            f"{noun}_{other}".upper(),
            f"{verb}_{noun}",
            f"{verb}{noun.title().replace('_', '')}",
        )
    )


def value(rng: random.Random, tool: str, argument: str) -> str:
    """A value for one argument of one tool."""
    if argument == "symbol":
        return symbol(rng)
    if argument == "pattern":
        return rng.choice((rng.choice(PATTERN_WORDS), rng.choice(PATTERN_PHRASES), symbol(rng)))
    if tool == "run_tests":
        return tests_path(rng)
    if tool == "list_files":
        return folder(rng)
    if tool == "read_file":
        return rng.choice(TOP_FILES) if rng.random() < 0.1 else file_in(rng, TEXT_SUFFIXES)
    if rng.random() < (0.7 if tool == "grep" else 0.3):
        return folder(rng)
    return file_in(rng, TEXT_SUFFIXES if tool == "git_diff" else CODE_SUFFIXES)


def rename_pair(rng: random.Random) -> tuple[str, str]:
    """Two names for a rename, mostly of the same kind and often with a part in common."""
    shape = rng.choice(("function", "function", "class", "class", "free"))
    if shape == "free":
        old, new = symbol(rng), symbol(rng)
    elif shape == "class":
        heads, tails = rng.sample(CLASS_HEADS, 2), rng.sample(CLASS_TAILS, 2)
        old, new = heads[0] + tails[0], rng.choice((heads[0], heads[1])) + tails[1]
    else:
        verbs, nouns = rng.sample(VERBS, 2), rng.sample(NOUNS, 2)
        old, new = f"{verbs[0]}_{nouns[0]}", f"{verbs[1]}_{rng.choice(nouns)}"
    return old, new
