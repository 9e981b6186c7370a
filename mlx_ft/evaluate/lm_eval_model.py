"""Our model behind lm-eval's interface. Imported only where that package is installed.

Does: render a task's messages through the chat template.
Does not: take plain text: a context that did not come from the template is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM

from mlx_ft.engine.generate import generate
from mlx_ft.engine.likelihood import likelihoods
from mlx_ft.engine.load import LoadedModel
from mlx_ft.errors import DataError, Fault
from mlx_ft.evaluate.harness import cut_at_stop
from mlx_ft.system.console import Progress

DEFAULT_MAX_TOKENS = 256
NO_TEMPLATE = Fault(
    "lm-eval",
    "the task prompts with plain text, which the chat template has no place for",
    "leave out tasks of perplexity on text and of mutual information (acc_mutual_info)",
)


class ChatModel(LM):  # type: ignore[misc]  # lm_eval has no type information
    """A loaded model behind its chat template.

    progress: shown after each request; its total is 1 for all requests of one call.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int, progress: Progress) -> None:
        super().__init__()
        self._loaded = loaded
        self._batch_size = batch_size
        self._progress = progress
        self._prompts: dict[str, list[int]] = {}

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm-eval caches requests."""
        return str(self._loaded.renderer.fingerprint()["template_sha256"])

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the template, for lm-eval's record of it."""
        return str(self._loaded.renderer.pinned_template())

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Return a rendered conversation, up to where the assistant speaks or, where its last turn
        is the assistant's, goes on.
        """
        renderer, turns = self._loaded.renderer, [dict(turn) for turn in chat_history]
        begun = ""
        if not add_generation_prompt and turns and turns[-1]["role"] == "assistant":
            begun = str(turns.pop()["content"])
        text = renderer.prompt_text(turns) + begun
        self._prompts[text] = [*renderer.prompt_ids(turns), *self._encode(begun)]
        return text

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return (log-probability, greedy) of each request's continuation after its context."""
        pairs = [request.args for request in requests]
        prompts = [self._prompt(context) for context, _ in pairs]
        found = likelihoods(
            self._loaded,
            prompts,
            [self._encode(text) for _, text in pairs],
            batch_size=self._batch_size,
            on_done=self._counter(len(pairs)),
        )
        return [(sum(each.log_probabilities), each.greedy) for each in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Raise DataError: it is asked of plain text."""
        raise DataError(NO_TEMPLATE)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the greedy answer after each request's context, up to its stop texts."""
        asked = [request.args for request in requests]
        sampled = [options for _, options in asked if options.get("do_sample")]
        if sampled:
            found = "the task samples (do_sample), and answers here are greedy"
            raise DataError(Fault("lm-eval", found, "leave the task out"))
        answers = generate(
            self._loaded,
            [self._prompt(context) for context, _ in asked],
            max_tokens=[int(o.get("max_gen_toks", DEFAULT_MAX_TOKENS)) for _, o in asked],
            batch_size=self._batch_size,
            on_done=self._counter(len(asked)),
        )
        return [
            cut_at_stop(answer.text, _stops(options))[0]
            for answer, (_, options) in zip(answers, asked, strict=True)
        ]

    def _prompt(self, context: str) -> list[int]:
        if context not in self._prompts:
            raise DataError(NO_TEMPLATE)
        return self._prompts[context]

    def _encode(self, text: str) -> list[int]:
        ids = self._loaded.renderer.tokenizer.encode(text, add_special_tokens=False)
        return [int(token) for token in ids]

    def _counter(self, of: int) -> Callable[[int, object], None]:
        done = 0

        def count(index: int, result: object) -> None:
            nonlocal done
            done += 1
            self._progress.update(done / of, f"{done} of {of}")

        return count


def _stops(options: Mapping[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [until] if isinstance(until, str) else [stop for stop in until if stop]
