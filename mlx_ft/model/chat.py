"""ChatRenderer: the only caller of a chat template.

Does: turn conversations into token ids, for training (with a mask of the trained tokens) and for
prompting. Name the stop tokens. Fingerprint the format, so that later stages can prove that they
agree.
Does not: load models, import MLX, or offer any way to prompt a chat model with a bare string.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_ft.errors import Fault, ModelError
from mlx_ft.model.tokenizer_files import ANY_STRFTIME_CALL, load_tokenizer, pin_date, stop_ids_of
from mlx_ft.recipe.cli_defaults import DEFAULT_DATE

if TYPE_CHECKING:
    from mlx_ft.recipe.schema import ChatRecipe

Message = Mapping[str, Any]
# A conversation (messages, tools) on its way to a row: it gives texts and is given their ids.
Conversation = tuple[Sequence[Message], Sequence[Mapping[str, Any]] | None]

# Rendered into every fingerprint: one turn, a system prompt with two turns, a follow-up.
CANONICAL_CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "Hello"},),
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Sure?"},
    ),
    ({"role": "user", "content": "  Zwölf Boxkämpfer\njagen 12345 🦊\t"},),
)


class RowRefused(ValueError):
    """A conversation that cannot be trained honestly; the message is the reason."""


@dataclass(frozen=True)
class RenderedRow:
    """One training row: token `ids`, and for each whether it is `trained` (same length)."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.trained)


def _spoken(message: Message) -> str:
    """Return all that a message says (content, reasoning, calls) as one text, to look into."""
    return json.dumps(dict(message), ensure_ascii=False, default=str)


@dataclass(frozen=True)
class ChatFormat:
    """How a model's conversations become text, as far as its template leaves that open.

    enable_thinking: the thinking mode of models that have one.
    date: the day that templates are told is today (ISO 8601).
    """

    enable_thinking: bool = False
    date: str = DEFAULT_DATE

    @classmethod
    def of(cls, chat: ChatRecipe) -> ChatFormat:
        """Return the format that a recipe asks for."""
        return cls(chat.enable_thinking, chat.date)


class ChatRenderer:
    """Turn conversations into token ids, always through the model's own chat template.

    chat: the format that all conversations have.
    stop_ids: the ids that end an answer.
    special_ids: all control tokens of the tokenizer.
    """

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int], chat: ChatFormat) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.special_ids = frozenset(int(i) for i in tokenizer.all_special_ids)
        self.chat = chat
        self._day = datetime.date.fromisoformat(chat.date)

    @classmethod
    def from_folder(cls, folder: Path, chat: ChatFormat) -> ChatRenderer:
        """Build the renderer of a model folder.

        Raises ModelError when there is no tokenizer, no chat template, no stop token, or a template
        that cannot render a plain conversation.
        """
        tokenizer = load_tokenizer(folder)
        if not isinstance(tokenizer.chat_template, str | dict) or not tokenizer.chat_template:
            raise ModelError(
                Fault(
                    str(folder),
                    "the tokenizer has no chat template",
                    "use an instruct model, or add chat_template.jinja to the folder",
                )
            )
        stop_ids = stop_ids_of(tokenizer, folder)
        if not stop_ids:
            raise ModelError(
                Fault(str(folder), "no stop token is defined", "set eos_token in its tokenizer")
            )
        renderer = cls(tokenizer, stop_ids, chat)
        renderer._check_template(folder)
        return renderer

    def _check_template(self, folder: Path) -> None:
        try:
            self._render(CANONICAL_CONVERSATIONS[0], None, add_generation_prompt=True)
        except RowRefused as error:
            raise ModelError(
                Fault(str(folder), f"chat template fails: {error}", "repair the template")
            ) from error
        if any(ANY_STRFTIME_CALL.search(text) for text in self._templates().values()):
            raise ModelError(
                Fault(
                    str(folder),
                    "the chat template prints today's date in a way that cannot be pinned",
                    'write strftime_now("...") with its format as plain text',
                )
            )

    def _templates(self) -> dict[str, str]:
        """Return the template's variants by name (most models have one), with the date pinned."""
        given = self.tokenizer.chat_template
        named = given if isinstance(given, dict) else {"default": given}
        return {name: pin_date(text, self._day) for name, text in sorted(named.items())}

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        given: object = messages  # whatever the annotation says
        if isinstance(given, str | bytes):
            raise TypeError("a chat model is prompted with messages, never with a bare string")
        given_tools = list(tools) if tools else None
        try:
            template = self.tokenizer.get_chat_template(tools=given_tools)
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=given_tools,
                    chat_template=pin_date(template, self._day),
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    enable_thinking=self.chat.enable_thinking,
                )
            )
        except Exception as error:  # a template is its author's program: it can raise anything
            raise RowRefused(f"the chat template refuses it ({error})") from error

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        # A template writes the special tokens itself: adding them again would double the BOS.
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:  # half of a surrogate pair cannot be handed to the tokenizer
            raise RowRefused(f"the tokenizer refuses its text ({error})") from error
        return [int(i) for i in ids]

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Return the ids of a conversation up to where the assistant is to speak.

        Raises TypeError for a bare string, RowRefused when the template cannot render it.
        """
        return self._encode(self.prompt_text(messages, tools))

    def prompt_text(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """Return the text that `prompt_ids` encodes, for other programs' templates to be compared
        with; raises as it does.
        """
        return self._render(messages, tools, add_generation_prompt=True)

    def answer_ids(
        self,
        messages: Sequence[Message],
        answer: str,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[int, ...]:
        """Return the ids of an answer as they would be trained, stop token included; RowRefused."""
        said = {"role": "assistant", "content": answer}
        row = self.training_row([*messages, said], tools, mask_prompt=True)
        last = max(index for index, trained in enumerate(row.trained) if trained)
        return row.ids[len(self.prompt_ids(messages, tools)) : last + 1]

    def pinned_template(self) -> str | dict[str, str]:
        """Return the model's chat template, or its variants by name, with the date pinned."""
        templates = self._templates()
        return templates if isinstance(self.tokenizer.chat_template, dict) else templates["default"]

    def training_row(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        mask_prompt: bool,
    ) -> RenderedRow:
        """Return a conversation's ids, and a mask of the trained ones.

        With `mask_prompt`, the trained ids are the assistant's turns, each from its first token to
        its stop token inclusive. Without, they are all but the first.
        Raises RowRefused when an assistant's prompt is not a token prefix of the conversation: the
        beginning of its answer is then unknown. The same for a turn without a stop token, or with
        one inside its text: the model would stop there, and never say the rest. The same when
        nothing would be trained.
        """
        (row,) = self.training_rows([(messages, tools)], mask_prompt=mask_prompt)
        if isinstance(row, RowRefused):
            raise row
        return row

    def training_rows(
        self, conversations: Sequence[Conversation], *, mask_prompt: bool
    ) -> list[RenderedRow | RowRefused]:
        """Return, for each conversation, the result or the RowRefused of `training_row`.

        Much faster than one by one: their texts go to the tokenizer together.
        """
        rows: dict[int, RenderedRow | RowRefused] = {}
        steps = {
            index: self._row_steps(messages, tools, mask_prompt)
            for index, (messages, tools) in enumerate(conversations)
        }
        answers: dict[int, list[int] | RowRefused | None] = dict.fromkeys(steps)
        while answers:
            texts: dict[int, str] = {}
            for index, ids in answers.items():
                try:
                    if isinstance(ids, RowRefused):
                        texts[index] = steps[index].throw(ids)
                    else:
                        texts[index] = steps[index].send(ids)  # type: ignore[arg-type]  # None begins
                except StopIteration as end:
                    rows[index] = end.value
                except RowRefused as refused:
                    rows[index] = refused
            encoded = self._encode_together(list(texts.values()))
            answers = dict(zip(texts, encoded, strict=True))
        return [rows[index] for index in range(len(conversations))]

    def _encode_together(self, texts: Sequence[str]) -> Sequence[list[int] | RowRefused]:
        if not texts:
            return []
        try:
            together = self.tokenizer(
                list(texts),
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        except TypeError:  # one of them has half of a surrogate pair
            return [self._encode_or_refusal(text) for text in texts]
        encoded: list[list[int]] = together["input_ids"]
        return encoded

    def _encode_or_refusal(self, text: str) -> list[int] | RowRefused:
        try:
            return self._encode(text)
        except RowRefused as refused:
            return refused

    def _row_steps(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        mask_prompt: bool,
    ) -> Generator[str, list[int], RenderedRow]:
        """Yield the texts of a conversation that are to be encoded, and return its row."""
        ids = yield self._render(messages, tools, add_generation_prompt=False)
        if not ids:
            raise RowRefused("the chat template renders nothing")
        if not mask_prompt:
            return RenderedRow(tuple(ids), (False,) + (True,) * (len(ids) - 1))
        trained = [False] * len(ids)
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            start, stop = yield from self._answer_span(ids, messages, index, tools)
            trained[start:stop] = [True] * (stop - start)
        if not any(trained):
            raise RowRefused("no assistant turn, so nothing would be trained")
        return RenderedRow(tuple(ids), tuple(trained))

    def _answer_span(
        self,
        ids: list[int],
        messages: Sequence[Message],
        index: int,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> Generator[str, list[int], tuple[int, int]]:
        """Return [start, stop) of the assistant turn `index` in the whole conversation's ids."""
        prompt = yield self._render(messages[:index], tools, add_generation_prompt=True)
        if ids[: len(prompt)] != prompt:
            raise RowRefused(
                f"the prompt of turn {index + 1} is not a token prefix of the conversation, so the "
                f"template renders this turn differently in training than in use "
                f"(enable_thinking is {str(self.chat.enable_thinking).lower()})"
            )
        spoken = _spoken(messages[index])
        if self._may_hold_a_stop(spoken) and self.stop_ids.intersection((yield spoken)):
            raise RowRefused(f"turn {index + 1} has a stop token inside its text")
        # What follows the last turn (an end-of-text token, say) is not there in the middle, so the
        # turn is compared up to its stop token and no further.
        alone = ids
        if index + 1 < len(messages):
            alone = yield self._render(messages[: index + 1], tools, add_generation_prompt=False)
        stop = next((i for i in range(len(prompt), len(alone)) if alone[i] in self.stop_ids), None)
        if stop is None:
            raise RowRefused(f"the template ends turn {index + 1} without a stop token")
        if ids[: stop + 1] != alone[: stop + 1]:
            raise RowRefused(
                f"turn {index + 1} is rendered differently once another turn follows it"
            )
        return len(prompt), stop + 1

    def _may_hold_a_stop(self, text: str) -> bool:
        """Return False when no token of a text can be a stop token.

        That is certain when all stop tokens are marks that are looked for as they are written, and
        none is there.
        """
        marks = self._stop_marks
        return marks is None or any(mark in text for mark in marks)

    @functools.cached_property
    def _stop_marks(self) -> tuple[str, ...] | None:
        """The stop tokens' texts, or None where one is a word of the vocabulary or is looked for in
        a text that has been normalised.
        """
        added = self.tokenizer.added_tokens_decoder
        found = [added.get(token) for token in self.stop_ids]
        if any(token is None or token.normalized for token in found):
            return None
        return tuple(str(token.content) for token in found if token is not None)

    def training_spans(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation's rendered text, and where in it each token of its row begins and
        ends. Raises RowRefused when the tokenizer cannot say.
        """
        text = self._render(messages, tools, add_generation_prompt=False)
        try:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except NotImplementedError as error:
            raise RowRefused("the tokenizer cannot say where its tokens lie in a text") from error
        assert [int(i) for i in encoded["input_ids"]] == self._encode(text)
        return text, [(int(start), int(end)) for start, end in encoded["offset_mapping"]]

    def text_row(self, text: str) -> RenderedRow:
        """Return plain text as the tokenizer begins it (a BOS where it has one), with its end
        token; every token but the first is trained.
        """
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if end is None:
            raise RowRefused("the tokenizer has no end token for plain text")
        ids = self._encode(text, add_special_tokens=True)
        if begin is not None and ids[:2] == [begin, begin]:
            ids = ids[1:]  # the text brought its own
        if ids[-1:] != [end]:
            ids.append(int(end))
        if len(ids) - (ids[0] == begin) < 2:
            raise RowRefused("the text is empty")
        return RenderedRow(tuple(ids), (False,) + (True,) * (len(ids) - 1))

    def token_count(self, text: str) -> int:
        """Return how many tokens a text is by itself."""
        return len(self._encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without control tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def decode_raw(self, ids: Sequence[int]) -> str:
        """Return the text of ids with control tokens spelled out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def fingerprint(self) -> dict[str, Any]:
        """Return the facts that training, evaluation and the exported model must share.

        Plain JSON: the template's sha256, the ids of three canonical prompts, the special tokens,
        stop ids, thinking mode and pinned date.
        """
        given = self.tokenizer.chat_template
        template = given if isinstance(given, str) else json.dumps(given, sort_keys=True)
        renders: list[list[int] | str] = []
        for messages in CANONICAL_CONVERSATIONS:
            try:
                renders.append(self.prompt_ids(messages))
            except RowRefused as error:  # some templates refuse a system turn; that is a fact too
                renders.append(str(error))
        special = {
            str(token): int(self.tokenizer.convert_tokens_to_ids(token))
            for token in self.tokenizer.all_special_tokens
        }
        return {
            "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
            "canonical_prompts": renders,
            "special_tokens": dict(sorted(special.items())),
            "stop_ids": sorted(self.stop_ids),
            "enable_thinking": self.chat.enable_thinking,
            "date": self._day.isoformat(),
        }
