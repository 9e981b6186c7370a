"""A Jinja chat template in Go (text/template), learned from the texts that it renders.

Ollama does not run a model's Jinja template. Most templates write fixed texts around the contents
of the turns, which Go can do too.
Does: find these texts by rendering a few short conversations, and prove on longer ones that they
are complete. Does not: return a template whose text differs from the model's own, or one for tools.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mlx_ft.model.chat import Message, RowRefused

Render = Callable[[Sequence[Message]], str]

# Contents that occur in no template, without white space, which some templates strip.
SYSTEM, ASKED, SAID, ASKED_AGAIN = "Zsystem1Z", "Zasked2Z", "Zsaid3Z", "Zasked4Z"
TURNS = ("Zwei Zeilen\nund 12345.", "Yes.", "Is {curly} fine?", '"Quoted", yes', "Bye", "Bye.", "?")
# Texts that end a TEMPLATE of a Modelfile, or begin or end an action in Go.
UNSAYABLE = ('"""', "{{", "}}")


@dataclass(frozen=True)
class TurnTexts:
    """Texts that a template writes around the contents of a conversation.

    start: before the first user turn. before_system, after_system: instead of start when there is a
    system prompt (None: the template takes none). to_assistant, to_user: between turns. end: after
    the last user turn.
    """

    start: str
    before_system: str | None
    after_system: str | None
    to_assistant: str
    to_user: str
    end: str

    @property
    def all(self) -> tuple[str, ...]:
        system = (self.before_system or "", self.after_system or "")
        return (self.start, *system, self.to_assistant, self.to_user, self.end)


def conversation(contents: Sequence[str], system: str | None = None) -> list[Message]:
    """Return messages with these contents, user and assistant in turn."""
    roles = ("user", "assistant")
    turns: list[Message] = [
        {"role": roles[i % 2], "content": text} for i, text in enumerate(contents)
    ]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def learn_turn_texts(render: Render) -> TurnTexts | None:
    """Return the texts that make up a template, or None when it is more than fixed texts.

    render: conversation -> its text, up to the beginning of the assistant's answer.
    """
    try:
        start, end = _cut(render(conversation([ASKED])), ASKED)
        texts = _cut(render(conversation([ASKED, SAID, ASKED_AGAIN])), ASKED, SAID, ASKED_AGAIN)
        learned = TurnTexts(start, None, None, texts[1], texts[2], end)
        learned = _with_system(learned, render)
        lengths = range(1, len(TURNS) + 1, 2)
        systems = [None] if learned.before_system is None else [None, "Be brief.\nAlways."]
        proofs = [conversation(TURNS[:n], system) for n in lengths for system in systems]
        same = all(compose(learned, messages) == render(messages) for messages in proofs)
    except (RowRefused, ValueError):
        return None
    return learned if same else None


def _cut(text: str, *contents: str) -> list[str]:
    """Return the texts around `contents`. Raises ValueError unless each occurs once, in order."""
    parts = []
    for content in contents:
        before, text = text.split(content)
        parts.append(before)
    return [*parts, text]


def _with_system(learned: TurnTexts, render: Render) -> TurnTexts:
    try:
        before, after, _ = _cut(render(conversation([ASKED], SYSTEM)), SYSTEM, ASKED)
    except (RowRefused, ValueError):
        return learned
    return replace(learned, before_system=before, after_system=after)


def compose(texts: TurnTexts, messages: Sequence[Message]) -> str:
    """Return the text that `go_template(texts)` renders for messages that end with a user turn."""
    turns = [message for message in messages if message["role"] != "system"]
    system = next((m["content"] for m in messages if m["role"] == "system"), None)
    said = texts.start
    if system is not None and texts.before_system is not None:
        said = f"{texts.before_system}{system}{texts.after_system}"
    for index, message in enumerate(turns):
        if message["role"] == "assistant":
            said += texts.to_assistant
        elif index:
            said += texts.to_user
        said += message["content"]
    return said + texts.end


def without_first_token(texts: TurnTexts, token: str | None) -> TurnTexts:
    """Return the texts without the first token, which programs that read the GGUF add."""
    if not token:
        return texts
    before = texts.before_system
    return replace(
        texts,
        start=texts.start.removeprefix(token),
        before_system=None if before is None else before.removeprefix(token),
    )


def go_template(texts: TurnTexts) -> str | None:
    """Return the template in Go, or None when its texts cannot be written into a Modelfile.

    A Modelfile's parser drops unprintable characters.
    """
    whole = "".join(texts.all).replace("\n", "").replace("\t", "")
    if not whole.isprintable() or any(mark in text for mark in UNSAYABLE for text in texts.all):
        return None
    start = texts.start
    if texts.before_system is not None:
        given = f"{texts.before_system}{{{{ $.System }}}}{texts.after_system}"
        start = f"{{{{ if $.System }}}}{given}{{{{ else }}}}{start}{{{{ end }}}}"
    return (
        "{{ $first := true }}{{ range $i, $_ := .Messages }}"
        "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq .Role "user" }}{{ if $first }}'
        f"{start}{{{{ $first = false }}}}{{{{ else }}}}{texts.to_user}{{{{ end }}}}"
        f"{{{{ .Content }}}}{{{{ if $last }}}}{texts.end}{{{{ end }}}}"
        f'{{{{ else if eq .Role "assistant" }}}}{texts.to_assistant}{{{{ .Content }}}}'
        "{{ end }}{{ end }}"
    )
