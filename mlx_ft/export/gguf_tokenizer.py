"""Tokenizer in GGUF terms: tokens, types, merges or scores, special ids.

Does: recognise the tokenizer by its pre_tokenizer and normalizer (entries of tokenizer.json), whose
regular expressions llama.cpp has under a name (`tokenizer.ggml.pre`, src/llama-vocab.cpp). An
unknown tokenizer is refused, never guessed. llama.cpp's own converter compares a hash of the ids of
one text, which only works for vocabularies on its list.
Does not: write a file (`gguf.py`), or read tokenizer.json itself. transformers rebuilds some
tokenizers as it loads them, and the ids that were trained are those of the loaded one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from mlx_ft.errors import Fault, ModelError
from mlx_ft.model.chat import CANONICAL_CONVERSATIONS, ChatFormat, ChatRenderer

Step = tuple[Any, ...]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A ByteLevel step that only maps bytes to letters, after a Split has cut the text; and one that
# cuts by GPT-2's expression itself.
_BYTES: Step = ("ByteLevel", False, False)
_GPT2_BYTES: Step = ("ByteLevel", False, True)


def _split(pattern: str) -> Step:
    return ("Split", "Regex", pattern, "Isolated", False)


@dataclass(frozen=True)
class _PreTokenizer:
    """A byte-level pre-tokenizer of llama.cpp.

    name: its name. ignore_merges: whole words are looked up in the vocabulary before merging. nfc:
    the original normalizes to NFC first; llama.cpp does not, and composed text is the same.
    """

    name: str
    ignore_merges: bool
    nfc: bool = False


_BYTE_LEVEL: Mapping[tuple[Step, ...], _PreTokenizer] = {
    (_GPT2_BYTES,): _PreTokenizer("gpt-2", False),
    (("Digits", True), _GPT2_BYTES): _PreTokenizer("smollm", False),
    (_split(_LLAMA3), _BYTES): _PreTokenizer("llama-bpe", True),
    (_split(_QWEN2), _BYTES): _PreTokenizer("qwen2", False, nfc=True),
    (_split(_TEKKEN), _BYTES): _PreTokenizer("tekken", True),
}

SPACE = "\u2581"
_REPLACE: Step = ("Replace", "String", " ", SPACE)
_GEMMA_SPLIT: Step = ("Split", "String", " ", "MergedWithPrevious", False)
_FIRST_ONLY: tuple[Step, ...] = (("Metaspace", SPACE, "first", False),)
# (normalizer, pre_tokenizer) of tokenizers that were made with SentencePiece -> whether llama.cpp
# must put a space before the text and after each special token.
_SENTENCEPIECE: Mapping[tuple[tuple[Step, ...], tuple[Step, ...]], bool] = {
    ((_REPLACE,), ()): False,
    ((_REPLACE,), (_GEMMA_SPLIT,)): False,
    ((("Prepend", SPACE), _REPLACE), ()): True,
    # A space at the very beginning only: none at all in a prompt that begins with a special token.
    ((), _FIRST_ONLY): False,
    ((), (("Metaspace", SPACE, "never", False),)): False,
}
# Below every merge: a piece that no merge makes must never win against one.
_NO_MERGE = -1e9


@dataclass(frozen=True)
class SpecialTokens:
    """Special ids; None where there is none.

    stops: one to three ids that end an answer, for llama.cpp's eos, eot and eom. add_bos, add_eos:
    plain text gets a BOS or an EOS.
    """

    stops: tuple[int, ...]
    bos: int | None
    unknown: int | None
    padding: int | None
    add_bos: bool
    add_eos: bool


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer in GGUF terms.

    model: gpt2 (byte-level BPE with merges) or llama (SentencePiece with scores). tokens, types,
    scores: one entry per row of the embedding. templates: chat templates by name, unchanged.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    add_space_prefix: bool | None
    special: SpecialTokens
    templates: Mapping[str, str]


def read_tokenizer(folder: Path, rows: int) -> GgufTokenizer:
    """Return the tokenizer of a model folder for an embedding of `rows` rows.

    Rows without a token are named and marked as unused. An added token beyond the last row (the
    image tokens of a text-only Gemma 3) is left out, because the model cannot generate it. Raises
    ModelError.
    """
    path = folder / "tokenizer.json"
    renderer = ChatRenderer.from_folder(folder, ChatFormat(date="2000-01-01"))
    try:
        described = json.loads(renderer.tokenizer.backend_tokenizer.to_str())
    except AttributeError as error:  # one that is written in Python, or is not by `tokenizers`
        raise _refusal(path, "needed for a GGUF, and not what this model's tokenizer is") from error
    model = described["model"]
    if model.get("type") != "BPE" or model.get("dropout") or model.get("end_of_word_suffix"):
        raise _refusal(path, f"a {model.get('type')} tokenizer of a kind llama.cpp has not")
    _require_plain_added_tokens(described, path)
    special = _special_tokens(renderer, rows, path)
    merges = tuple(_merge_pair(merge) for merge in model["merges"])
    steps = _steps(described.get("pre_tokenizer"))
    byte_level = bool(steps) and steps[-1][0] == "ByteLevel"
    ranks = {} if byte_level else _ranks(merges)
    tokens, types = _tokens(described, rows, frozenset(special.stops), frozenset(ranks), path)
    given = renderer.tokenizer.chat_template
    return GgufTokenizer(
        model="gpt2" if byte_level else "llama",
        pre=_byte_level(described, steps, path) if byte_level else "default",
        tokens=tokens,
        types=types,
        merges=tuple(f"{left} {right}" for left, right in merges) if byte_level else (),
        scores=() if byte_level else tuple(_score(token, ranks) for token in tokens),
        add_space_prefix=None if byte_level else _space_prefix(described, steps, renderer, path),
        special=special,
        templates=given if isinstance(given, dict) else {"default": given},
    )


def _refusal(path: Path, found: str) -> ModelError:
    return ModelError(Fault(str(path), found, "set export.gguf: null"))


def _steps(entry: Mapping[str, Any] | None) -> tuple[Step, ...]:
    """Return a normalizer or pre_tokenizer as the steps that change ids, sequences flattened."""
    if entry is None:
        return ()
    kind = entry["type"]
    if kind == "Sequence":
        parts = entry.get("pretokenizers") or entry.get("normalizers") or ()
        return tuple(step for part in parts for step in _steps(part))
    if kind == "ByteLevel":  # trim_offsets changes offsets, no ids
        return ((kind, entry["add_prefix_space"], entry.get("use_regex", True)),)
    if kind == "Digits":
        return ((kind, entry["individual_digits"]),)
    if kind == "Split":
        ((syntax, pattern),) = entry["pattern"].items()
        return ((kind, syntax, pattern, entry["behavior"], entry["invert"]),)
    if kind == "Replace":
        ((syntax, pattern),) = entry["pattern"].items()
        return ((kind, syntax, pattern, entry["content"]),)
    if kind == "Prepend":
        return ((kind, entry["prepend"]),)
    if kind == "Metaspace":
        scheme = entry.get("prepend_scheme", "always")
        return ((kind, entry["replacement"], scheme, entry.get("split", True)),)
    return ((kind, json.dumps(entry, sort_keys=True)),)


def _byte_level(described: Mapping[str, Any], steps: tuple[Step, ...], path: Path) -> str:
    """Return llama.cpp's name of a byte-level pre-tokenizer. Raises ModelError."""
    pre = _BYTE_LEVEL.get(steps)
    if pre is None:
        known = ", ".join(entry.name for entry in _BYTE_LEVEL.values())
        raise _refusal(path, f"unknown pre-tokenizer {steps}; known are those of {known}")
    normalizer = _steps(described.get("normalizer"))
    if normalizer and not (pre.nfc and normalizer[0][0] == "NFC" and len(normalizer) == 1):
        raise _refusal(path, f"llama.cpp's {pre.name} has no normalizer {normalizer}")
    if bool(described["model"].get("ignore_merges")) != pre.ignore_merges:
        value = str(not pre.ignore_merges).lower()
        raise _refusal(path, f"ignore_merges is {value}, unlike llama.cpp's {pre.name}")
    return pre.name


def _space_prefix(
    described: Mapping[str, Any], steps: tuple[Step, ...], renderer: ChatRenderer, path: Path
) -> bool:
    """Return whether a SentencePiece tokenizer puts a space before text. Raises ModelError."""
    found = (_steps(described.get("normalizer")), steps)
    if found not in _SENTENCEPIECE or not described["model"].get("byte_fallback"):
        raise _refusal(path, f"unknown normalizer and pre-tokenizer {found}")
    if steps == _FIRST_ONLY:
        first = renderer.prompt_ids(CANONICAL_CONVERSATIONS[0])[0]
        if first not in renderer.special_ids:
            raise _refusal(
                path, "its prompts begin with a space that llama.cpp would repeat after each token"
            )
    return _SENTENCEPIECE[found]


def _merge_pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Return the two pieces of a merge, which tokenizer.json has as one string or as a pair."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _ranks(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Return piece -> place of the first merge that makes it.

    SentencePiece's scores of BPE pieces are these places, negated, and llama.cpp joins the pair
    with the highest score first, as the merges do.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return ranks


def _score(token: str, ranks: Mapping[str, int]) -> float:
    return float(-ranks[token]) if token in ranks else _NO_MERGE


def _require_plain_added_tokens(described: Mapping[str, Any], path: Path) -> None:
    for entry in described.get("added_tokens") or ():
        if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word"):
            raise _refusal(
                path, f"the token {entry['content']} takes spaces with it, which GGUF cannot say"
            )


def _tokens(
    described: Mapping[str, Any],
    rows: int,
    stops: frozenset[int],
    made: frozenset[str],
    path: Path,
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the token and the type of every row of the embedding.

    An added token with a space in it that merges make too is an ordinary piece. llama.cpp looks for
    added tokens before it replaces spaces.
    """
    tokens = [f"[PAD{row}]" for row in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    sentencepiece = bool(described["model"].get("byte_fallback"))
    unknown = described["model"].get("unk_token")
    for token, row in described["model"]["vocab"].items():
        if row >= rows:
            raise _refusal(path, f"token {token!r} has id {row}, the embedding {rows} rows")
        tokens[row], types[row] = token, int(TokenType.NORMAL)
        if sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[row] = int(TokenType.BYTE)
        if sentencepiece and token == unknown:
            types[row] = int(TokenType.UNKNOWN)
    for entry in described.get("added_tokens") or ():
        token, row = entry["content"], entry["id"]
        if row >= rows or types[row] == TokenType.UNKNOWN:
            continue
        tokens[row] = token
        if entry["special"] or row in stops:
            types[row] = int(TokenType.CONTROL)
        elif not (token in made and SPACE in token):
            types[row] = int(TokenType.USER_DEFINED)
    twice = len(tokens) - len(set(tokens))
    if twice:
        raise _refusal(path, f"{twice} tokens have two ids, which llama.cpp refuses")
    return tuple(tokens), tuple(types)


def _special_tokens(renderer: ChatRenderer, rows: int, path: Path) -> SpecialTokens:
    tokenizer = renderer.tokenizer
    stops = sorted(renderer.stop_ids, key=lambda stop: (stop != tokenizer.eos_token_id, stop))
    if len(stops) > 3 or max(stops) >= rows:
        raise _refusal(
            path, f"stop ids {stops}: a GGUF has room for three, each a row of the embedding"
        )
    bare = [int(token) for token in tokenizer.encode("a", add_special_tokens=False)]
    full = [int(token) for token in tokenizer.encode("a", add_special_tokens=True)]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return SpecialTokens(
        stops=tuple(stops),
        bos=bos,
        unknown=tokenizer.unk_token_id,
        padding=tokenizer.pad_token_id,
        add_bos=bos is not None and full[0] == bos and bare[:1] != [bos],
        add_eos=eos is not None and full[-1] == eos and bare[-1:] != [eos],
    )
