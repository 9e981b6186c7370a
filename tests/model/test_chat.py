"""The one renderer: what is trained is what the assistant says, and prompts are what others render.

The tiny tokenizer is real (byte-level BPE); where the tokenizers of Qwen3 and Llama 3 are at hand,
the same is shown on them, and what mlx-lm does with the same rows is reproduced beside it.
"""

import datetime
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import load as load_mlx_lm_tokenizer
from mlx_lm.tuner.datasets import ChatDataset, TextDataset
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from mlx_ft.errors import ModelError
from mlx_ft.model.chat import ChatFormat, ChatRenderer, Message, RenderedRow, RowRefused
from mlx_ft.model.tokenizer_files import pin_date
from tests.support.paths import TOKENIZERS
from tests.support.tokenizers import CHATML_TEMPLATE, SPECIAL_TOKENS, write_tiny_tokenizer

DAY = "2025-01-01"
STOP = "<|im_end|>"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lint",
            "description": "Check a file.",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
        },
    }
]
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  Zwölf\n\tBoxkämpfer 🦊 "},
        {"role": "assistant", "content": "print('ok')\n"},
    ],
)
TWO_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def open_renderer(folder: Path, thinking: bool = False, date: str = DAY) -> ChatRenderer:
    return ChatRenderer.from_folder(folder, ChatFormat(thinking, date))


@functools.cache
def open_real(name: str, thinking: bool = False) -> ChatRenderer:
    return open_renderer(TOKENIZERS / name, thinking)


@functools.cache
def open_with_mlx_lm(name: str) -> Any:
    return load_mlx_lm_tokenizer(TOKENIZERS / name)


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Write a fresh tiny tokenizer; keyword arguments change its tokenizer_config.json."""

    def make(**changes: Any) -> Path:
        folder = write_tiny_tokenizer(tmp_path / f"tokenizer-{len(list(tmp_path.iterdir()))}")
        return change_config(folder, **changes)

    return make


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def renderer(tiny_folder: Path) -> ChatRenderer:
    return open_renderer(tiny_folder)


@pytest.fixture(params=["qwen3", "llama3_1"])
def real(request: pytest.FixtureRequest) -> str:
    """Return the name of a real tokenizer that is at hand."""
    return needs(str(request.param))


def needs(name: str) -> str:
    if not (TOKENIZERS / name).exists():
        pytest.skip(f"needs the {name} tokenizer")
    return name


def trained_spans(row: RenderedRow) -> list[list[int]]:
    """Return the runs of consecutive trained ids, in order."""
    spans: list[list[int]] = []
    before = False
    for token, trained in zip(row.ids, row.trained, strict=True):
        if trained and not before:
            spans.append([])
        if trained:
            spans[-1].append(token)
        before = trained
    return spans


def spoken(row: RenderedRow, renderer: ChatRenderer) -> list[str]:
    return [renderer.decode_raw(span) for span in trained_spans(row)]


# Whole words, odd characters, and the tokenizer's own control tokens as plain text.
WORDS = st.sampled_from(["fox ", "Paris", "\n", " ", "🦊", "\x00", "‮", "\u2028", "{{ x }}", "</s>"])
TEXT = st.text() | st.lists(WORDS, min_size=1, max_size=6).map("".join)
ANSWER = TEXT.filter(lambda text: STOP not in text)
HOSTILE = st.lists(st.sampled_from(SPECIAL_TOKENS) | WORDS | st.text(max_size=5), max_size=6)
BROKEN = st.characters(min_codepoint=0xD800, max_codepoint=0xDFFF)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXT)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(HOSTILE.map("".join))})
        messages.append({"role": "assistant", "content": draw(ANSWER)})
    return messages


@given(messages=conversations())
@settings(max_examples=60)
def test_trained_is_every_answer_with_its_stop_token_and_nothing_else(
    renderer: ChatRenderer, messages: list[dict[str, Any]]
) -> None:
    """Control tokens in a user's text neither end a turn nor make one that is trained."""
    row = renderer.training_row(messages, mask_prompt=True)
    answers = [m["content"] + STOP for m in messages if m["role"] == "assistant"]
    assert spoken(row, renderer) == answers
    for span in trained_spans(row):
        assert span[-1] in renderer.stop_ids
        assert not renderer.stop_ids.intersection(span[:-1])


@given(messages=conversations())
@settings(max_examples=30)
def test_the_prompt_of_every_answer_is_a_prefix_of_the_row_and_not_trained(
    renderer: ChatRenderer, messages: list[dict[str, Any]]
) -> None:
    row = renderer.training_row(messages, mask_prompt=True)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = renderer.prompt_ids(messages[:index])
            assert list(row.ids[: len(prompt)]) == prompt
            assert row.trained[len(prompt)] and not row.trained[len(prompt) - 1]


@given(
    contents=st.lists(
        st.lists(st.sampled_from(SPECIAL_TOKENS) | WORDS | BROKEN | st.text(max_size=4), max_size=5)
        .map("".join)
        .filter(bool)
        | st.none()
        | st.integers(),
        min_size=1,
        max_size=3,
    ),
    role=st.sampled_from(["user", "assistant", "system", "tool", "oracle"]),
)
@settings(max_examples=60)
def test_hostile_text_is_rendered_or_refused_but_never_crashes(
    renderer: ChatRenderer, contents: list[Any], role: str
) -> None:
    messages = [{"role": role, "content": content} for content in contents]
    for render in (
        lambda: renderer.prompt_ids(messages),
        lambda: renderer.training_row(messages, mask_prompt=True),
        lambda: renderer.training_row(messages, mask_prompt=False),
        lambda: renderer.text_row(str(contents[0])),
    ):
        try:
            assert render()
        except RowRefused as error:
            assert str(error)


def test_a_stop_token_inside_an_answer_is_refused(renderer: ChatRenderer) -> None:
    """The model would stop there: what comes after could be trained but never said."""
    messages: list[Message] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": f"a{STOP}b"},
    ]
    with pytest.raises(RowRefused, match="turn 2 has a stop token inside"):
        renderer.training_row(messages, mask_prompt=True)
    call = {"function": {"name": "say", "arguments": {"text": STOP}}}
    messages[1] = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(RowRefused, match="turn 2 has a stop token inside"):
        renderer.training_row(messages, mask_prompt=True)


def test_nothing_to_train_is_refused(renderer: ChatRenderer) -> None:
    with pytest.raises(RowRefused, match="no assistant turn"):
        renderer.training_row([{"role": "user", "content": "q"}], mask_prompt=True)
    with pytest.raises(RowRefused):
        renderer.training_row([], mask_prompt=False)
    with pytest.raises(RowRefused, match="empty"):
        renderer.text_row("")


def test_without_masking_all_but_the_first_token_is_trained(renderer: ChatRenderer) -> None:
    row = renderer.training_row(TWO_TURNS, mask_prompt=False)
    assert row.trained == (False,) + (True,) * (len(row.ids) - 1)
    assert row.ids == renderer.training_row(TWO_TURNS, mask_prompt=True).ids


@pytest.mark.parametrize("bare", ["Hello", b"Hello", ""])
def test_a_bare_string_is_never_a_prompt(renderer: ChatRenderer, bare: Any) -> None:
    """Every public method that takes messages refuses it, by type and not by what it says."""
    with pytest.raises(TypeError, match="bare string"):
        renderer.prompt_ids(bare)
    for mask_prompt in (True, False):
        with pytest.raises(TypeError, match="bare string"):
            renderer.training_row(bare, mask_prompt=mask_prompt)


def test_what_a_template_writes_after_the_last_stop_token_is_not_trained(
    make_folder: MakeFolder,
) -> None:
    """Templates such as Phi-3's end the conversation, not the turn, with an end-of-text token."""
    end = "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
    folder = make_folder(chat_template=CHATML_TEMPLATE + end)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    other = open_renderer(folder)
    assert other.stop_ids == {0, 2}
    row = other.training_row(TWO_TURNS, mask_prompt=True)
    assert other.decode_raw(row.ids).endswith(f"{STOP}\n<|endoftext|>")
    assert spoken(row, other) == [f"two{STOP}", f"four{STOP}"]


def test_a_turn_that_changes_once_another_follows_is_refused(make_folder: MakeFolder) -> None:
    changing = CHATML_TEMPLATE.replace(
        "(message['content'] or '')",
        "('final ' if loop.last and message['role'] == 'assistant' else '') + message['content']",
    )
    other = open_renderer(make_folder(chat_template=changing))
    row = other.training_row(TWO_TURNS[:2], mask_prompt=True)
    assert spoken(row, other) == [f"final two{STOP}"]
    with pytest.raises(RowRefused, match="turn 2 is rendered differently once another turn"):
        other.training_row(TWO_TURNS, mask_prompt=True)


def test_a_template_without_stop_tokens_cannot_train(make_folder: MakeFolder) -> None:
    endless = CHATML_TEMPLATE.replace("{{ '<|im_end|>\n' }}", "{{ '\n' }}")
    assert endless != CHATML_TEMPLATE
    with pytest.raises(RowRefused, match="turn 2 without a stop token"):
        open_renderer(make_folder(chat_template=endless)).training_row(
            CONVERSATIONS[0], mask_prompt=True
        )


def bos_folder(folder: Path) -> Path:
    """Make a tokenizer put `<|endoftext|>` before every text, and the template write it too."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return change_config(folder, chat_template="{{ bos_token }}" + CHATML_TEMPLATE)


def test_a_beginning_token_is_never_doubled(make_folder: MakeFolder) -> None:
    folder = bos_folder(make_folder())
    assert AutoTokenizer.from_pretrained(str(folder)).encode("fox")[0] == 0
    other = open_renderer(folder)
    for ids in (
        other.prompt_ids(TWO_TURNS[:1]),
        other.training_row(TWO_TURNS, mask_prompt=True).ids,
        other.text_row("the fox").ids,
        other.text_row("<|endoftext|>the fox").ids,
    ):
        assert ids[0] == 0 and list(ids).count(0) == 1
    with pytest.raises(RowRefused, match="empty"):
        other.text_row("")


def test_plain_text_is_tokenized_as_mlx_lm_does(make_folder: MakeFolder, tiny_folder: Path) -> None:
    for folder in (tiny_folder, bos_folder(make_folder())):
        theirs = TextDataset([], load_mlx_lm_tokenizer(folder))
        for text in ("the quick fox", "12345 🦊\n", f"said{STOP}"):
            row = open_renderer(folder).text_row(text)
            assert list(row.ids) == theirs.process({"text": text})[0]
            assert row.trained == (False,) + (True,) * (len(row.ids) - 1)


def transformers_ids(folder: Path, messages: Sequence[Message], **options: Any) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    return list(
        tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=True, return_dict=False, **options
        )
    )


def test_two_named_templates_are_chosen_as_transformers_chooses(make_folder: MakeFolder) -> None:
    named = [
        {"name": "default", "template": CHATML_TEMPLATE},
        {"name": "tool_use", "template": "{{ tools | tojson }}" + CHATML_TEMPLATE},
    ]
    folder = make_folder(chat_template=named)
    other = open_renderer(folder)
    for tools in (None, TOOLS):
        assert other.prompt_ids(TWO_TURNS[:1], tools) == transformers_ids(
            folder, TWO_TURNS[:1], tools=tools, add_generation_prompt=True
        )
    assert "lint" in other.decode(other.prompt_ids(TWO_TURNS[:1], TOOLS))
    named[1]["template"] += " "
    changed = open_renderer(change_config(folder, chat_template=named))
    assert changed.fingerprint()["template_sha256"] != other.fingerprint()["template_sha256"]


@pytest.mark.parametrize("thinking", [True, False])
def test_real_templates_render_what_transformers_renders(real: str, thinking: bool) -> None:
    ours = open_real(real, thinking)
    theirs = open_with_mlx_lm(real)._tokenizer  # a plain tokenizer of transformers
    for messages in CONVERSATIONS:
        for tools in (None, TOOLS):

            def render(
                given: Sequence[Message], tools: Any = tools, generation: bool = False
            ) -> list[int]:
                return list(
                    theirs.apply_chat_template(
                        given,
                        tools=tools,
                        tokenize=True,
                        return_dict=False,
                        add_generation_prompt=generation,
                        enable_thinking=thinking,
                    )
                )

            assert ours.prompt_ids(messages[:-1], tools) == render(messages[:-1], generation=True)
            row = ours.training_row(messages, tools, mask_prompt=True)
            assert list(row.ids) == render(messages)
            shown = "lint" in ours.decode(row.ids)
            assert shown == (tools is not None and real == "qwen3")  # the other knows no tools


@pytest.mark.parametrize("thinking", [True, False])
def test_real_templates_train_the_answer_and_its_stop_token(real: str, thinking: bool) -> None:
    ours = open_real(real, thinking)
    qwen = real == "qwen3"
    stop = STOP if qwen else "<|eot_id|>"
    # In thinking mode the model opens the thoughts itself, so they are part of what it says.
    thoughts = "<think>\n\n</think>\n\n" if qwen and thinking else ""
    row = ours.training_row(CONVERSATIONS[0], mask_prompt=True)
    assert spoken(row, ours) == [f"{thoughts}It is 4.{stop}"]
    if not qwen:
        row = ours.training_row(TWO_TURNS, mask_prompt=True)
        assert spoken(row, ours) == [f"two{stop}", f"four{stop}"]


def test_real_plain_text_is_tokenized_as_mlx_lm_does(real: str) -> None:
    theirs = TextDataset([], open_with_mlx_lm(real))
    for text in ("the quick fox", " 12345 🦊\n"):
        assert list(open_real(real).text_row(text).ids) == theirs.process({"text": text})[0]


@pytest.mark.parametrize(
    ("thinking", "reason"),
    [
        (False, "prompt of turn 2 is not a token prefix .*enable_thinking is false"),
        (True, "turn 2 is rendered differently once another turn follows"),
    ],
)
def test_qwen3_rows_of_several_answers_are_refused_and_not_mismasked(
    thinking: bool, reason: str
) -> None:
    """Its template writes thoughts into the last answer only: no earlier one is trained as used."""
    with pytest.raises(RowRefused, match=reason):
        open_real(needs("qwen3"), thinking).training_row(TWO_TURNS, mask_prompt=True)


def test_mlx_lm_masks_by_a_prompt_that_is_no_prefix() -> None:
    """Thinking off and thoughts in the data: the prompt that mlx-lm subtracts is not in the row, so
    what it takes for the answer begins in the middle of the thoughts.
    """
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "two and two are four"},
    ]

    class WithoutThinking:
        def apply_chat_template(self, given: Any, **options: Any) -> Any:
            return tokenizer.apply_chat_template(given, enable_thinking=False, **options)

    tokenizer = open_with_mlx_lm(needs("qwen3"))
    ids, offset = ChatDataset([], WithoutThinking(), mask_prompt=True).process(
        {"messages": messages}
    )
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, enable_thinking=False
    )
    assert len(prompt) == offset and ids[:offset] != prompt
    assert not tokenizer.decode(ids[offset:]).startswith(("<think>", "4"))
    with pytest.raises(RowRefused, match="prompt of turn 2 is not a token prefix"):
        open_real("qwen3").training_row(messages, mask_prompt=True)


def test_mlx_lm_forces_thinking_and_trains_the_last_turn_only() -> None:
    """Plain answers become empty thoughts, earlier ones are left out, and a token after the stop is
    trained; with thinking off, one answer is one answer here.
    """
    tokenizer = open_with_mlx_lm(needs("qwen3"))
    ids, offset = ChatDataset([], tokenizer, mask_prompt=True).process({"messages": TWO_TURNS})
    assert tokenizer.decode(ids[offset:]) == f"<think>\n\n</think>\n\nfour{STOP}\n"
    ours = open_real("qwen3")
    assert spoken(ours.training_row(TWO_TURNS[:2], mask_prompt=True), ours) == [f"two{STOP}"]


def test_mlx_lm_trains_the_users_words_when_they_come_last(
    tiny_folder: Path, renderer: ChatRenderer
) -> None:
    dataset = ChatDataset([], load_mlx_lm_tokenizer(tiny_folder), mask_prompt=True)
    ids, offset = dataset.process({"messages": TWO_TURNS[:3]})
    assert "three" in renderer.decode(ids[offset:])
    row = renderer.training_row(TWO_TURNS[:3], mask_prompt=True)
    assert spoken(row, renderer) == [f"two{STOP}"]


DATED = "{{ strftime_now('%d %b %Y') }} {{ strftime_now( \"%A\" ) }}\n" + CHATML_TEMPLATE


@given(day=st.dates(datetime.date(1990, 1, 1), datetime.date(2100, 1, 1)))
@settings(max_examples=25)
def test_pinning_leaves_the_given_day_and_no_call(day: datetime.date) -> None:
    pinned = pin_date(DATED, day)
    assert "strftime_now" not in pinned
    expected = f'{{{{ "{day:%d %b %Y}" }}}} {{{{ "{day:%A}" }}}}\n'
    assert pinned == expected + CHATML_TEMPLATE


def test_a_template_that_prints_the_date_prints_the_pinned_day(make_folder: MakeFolder) -> None:
    """The same text tomorrow: rendered by transformers alone, it would be today's."""
    folder = make_folder(chat_template=DATED)
    for day, text in ((DAY, "01 Jan 2025 Wednesday\n"), ("2020-02-29", "29 Feb 2020 Saturday\n")):
        other = open_renderer(folder, date=day)
        assert other.decode(other.prompt_ids(TWO_TURNS[:1])).startswith(text)
    unpinned = transformers_ids(folder, TWO_TURNS[:1], add_generation_prompt=True)
    assert unpinned != open_renderer(folder).prompt_ids(TWO_TURNS[:1])


@pytest.mark.parametrize("call", ["strftime_now(form)", "strftime_now ('%Y')"])
def test_a_date_that_cannot_be_pinned_is_refused(make_folder: MakeFolder, call: str) -> None:
    template = "{% set form = '%d %b %Y' %}{{ " + call + " }}" + CHATML_TEMPLATE
    with pytest.raises(ModelError, match="cannot be pinned"):
        open_renderer(make_folder(chat_template=template))


def test_a_templates_own_default_date_is_left_alone(make_folder: MakeFolder) -> None:
    """Whoever uses the exported model gets the template's default: training must see the same."""
    template = (
        "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
        "{{ date_string }}" + CHATML_TEMPLATE
    )
    folder = make_folder(chat_template=template)
    ids = open_renderer(folder).prompt_ids(TWO_TURNS[:1])
    assert ids == transformers_ids(folder, TWO_TURNS[:1], add_generation_prompt=True)


def test_the_fingerprint_is_json_and_the_same_for_the_same_folder(tiny_folder: Path) -> None:
    one, other = open_renderer(tiny_folder).fingerprint(), open_renderer(tiny_folder).fingerprint()
    assert json.loads(json.dumps(one, allow_nan=False)) == one == other


@given(place=st.integers(0, len(CHATML_TEMPLATE) - 1), character=st.sampled_from("aZ% {}'\n"))
@settings(max_examples=30)
def test_one_character_of_the_template_changes_the_fingerprint(
    tiny_folder: Path, renderer: ChatRenderer, place: int, character: str
) -> None:
    if CHATML_TEMPLATE[place] == character:
        return
    changed = CHATML_TEMPLATE[:place] + character + CHATML_TEMPLATE[place + 1 :]
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_folder))
    tokenizer.chat_template = changed
    other = ChatRenderer(tokenizer, renderer.stop_ids, ChatFormat(date=DAY))
    assert other.fingerprint() != renderer.fingerprint()


@pytest.mark.parametrize(
    "changes",
    [
        {"chat_template": CHATML_TEMPLATE + "{# nothing that shows #}"},
        {"bos_token": "<|im_start|>"},
        {"eos_token": "<|endoftext|>"},
    ],
    ids=["template", "beginning token", "end token"],
)
def test_tokenizer_changes_change_the_fingerprint(
    make_folder: MakeFolder, renderer: ChatRenderer, changes: dict[str, Any]
) -> None:
    assert open_renderer(make_folder(**changes)).fingerprint() != renderer.fingerprint()


def test_settings_and_stop_tokens_change_the_fingerprint(
    make_folder: MakeFolder, tiny_folder: Path, renderer: ChatRenderer
) -> None:
    stopping = make_folder()
    (stopping / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    others = (
        open_renderer(tiny_folder, thinking=True),
        open_renderer(tiny_folder, date="2025-01-02"),
        open_renderer(stopping),
    )
    seen = [json.dumps(r.fingerprint(), sort_keys=True) for r in (renderer, *others)]
    assert len(set(seen)) == len(seen)


def test_a_template_that_refuses_a_system_turn_still_has_a_fingerprint(
    make_folder: MakeFolder,
) -> None:
    strict = CHATML_TEMPLATE.replace("'system', ", "")
    renders = open_renderer(make_folder(chat_template=strict)).fingerprint()["canonical_prompts"]
    assert [type(render) for render in renders] == [list, str, list]
    assert "unknown role system" in renders[1]


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (None, "no chat template"),
        ("", "no chat template"),
        (7, "no chat template"),
        ("{% for m in messages %}{{ m.content }}", "unexpected|end of template"),
        ("{{ messages[99].content }}", "no element 99"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{{ messages.append(1) }}", "unsafe"),
        ([{"name": "tool_use", "template": CHATML_TEMPLATE}], "no default"),
    ],
)
def test_a_missing_or_broken_template_is_the_models_fault(
    make_folder: MakeFolder, template: Any, found: str
) -> None:
    with pytest.raises(ModelError, match=found) as caught:
        open_renderer(make_folder(chat_template=template))
    assert caught.value.exit_code == 2
    assert caught.value.faults[0].fix


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"a":'),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("generation_config.json", "{"),
        ("generation_config.json", "[]"),
        ("config.json", "\udcff"),
    ],
)
def test_broken_tokenizer_files_are_the_models_fault(
    make_folder: MakeFolder, name: str, content: str
) -> None:
    folder = make_folder()
    (folder / name).write_text(content, errors="surrogateescape")
    with pytest.raises(ModelError):
        open_renderer(folder)


def test_no_tokenizer_and_no_stop_token_are_refused(
    tmp_path: Path, make_folder: MakeFolder
) -> None:
    with pytest.raises(ModelError, match="no usable tokenizer"):
        open_renderer(tmp_path)
    with pytest.raises(ModelError, match="no stop token"):
        open_renderer(make_folder(eos_token=None))


def test_decoding_leaves_control_tokens_out_or_spells_them(renderer: ChatRenderer) -> None:
    ids = renderer.training_row(CONVERSATIONS[0], mask_prompt=True).ids
    assert STOP in renderer.decode_raw(ids) and STOP not in renderer.decode(ids)
    assert "It is 4." in renderer.decode(ids)


def test_rows_together_are_the_rows_one_by_one(renderer: ChatRenderer) -> None:
    """Refused ones too, each with its own reason, whatever stands beside it."""

    def talk(*texts: str) -> list[Message]:
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]

    conversations: list[list[Message]] = [
        talk("hello", "I am fine"),
        talk("a", "b", "c", "d"),
        talk("stop?", "it says <|im_end|> here"),
        talk("half", "of a pair \ud800"),
        talk("nobody answers"),
        [{"role": "wizard", "content": "x"}],
        [],
        *(talk(f"question {n}", "answer " * n) for n in range(1, 20)),
    ]

    def alone(messages: list[Message]) -> RenderedRow | str:
        try:
            return renderer.training_row(messages, mask_prompt=True)
        except RowRefused as refused:
            return str(refused)

    together = renderer.training_rows([(m, None) for m in conversations], mask_prompt=True)
    assert [str(r) if isinstance(r, RowRefused) else r for r in together] == [
        alone(messages) for messages in conversations
    ]
    assert sum(isinstance(row, RowRefused) for row in together) == 5


def test_a_stop_token_is_looked_for_by_its_text_only_where_that_is_enough(
    renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert renderer._stop_marks == ("<|im_end|>",)
    assert renderer._may_hold_a_stop("it ends <|im_end|>")
    assert not renderer._may_hold_a_stop("it goes on")
    word = ChatRenderer(
        renderer.tokenizer,
        frozenset(renderer._encode("fox")),
        ChatFormat(),
    )
    assert word._stop_marks is None and word._may_hold_a_stop("anything")
