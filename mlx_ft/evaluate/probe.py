"""`mlx-ft probe`: look at a model before training it.

Does: read config, template and card, ask a few ordinary questions and suites, and print the
findings. Record the probe, which the `family` check looks for.
Does not: compare models, or train.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_ft.errors import Fault, GateFailed
from mlx_ft.evaluate.local_model import ModelSource, loaded_column, open_loaded
from mlx_ft.evaluate.stage import answers_folder, suite_progress
from mlx_ft.evaluate.suites import load_suites
from mlx_ft.model.chat import ChatFormat, ChatRenderer, RowRefused
from mlx_ft.model.gguf_support import gguf_fault
from mlx_ft.model.resolve import ResolvedModel, resolve_model
from mlx_ft.model.shapes import model_shape
from mlx_ft.recipe.cli_defaults import DEFAULT_BATCH_SIZE
from mlx_ft.system.cache import cache_home
from mlx_ft.system.console import Console
from mlx_ft.system.files import write_json
from mlx_ft.text.quantities import format_bytes
from mlx_ft.text.repetition import degenerate_reason
from mlx_ft.text.safe import printable

if TYPE_CHECKING:
    from mlx_ft.engine.load import LoadedModel


def probe(
    name: str,
    revision: str | None,
    enable_thinking: bool,
    suites: Sequence[Path],
    console: Console,
) -> None:
    """Look at a model and measure it with suites, then write down that this was done.

    Raises GateFailed when its answers are degenerate.
    """
    # It loads scipy, which the preflight stage does not need for `probe_file`.
    from mlx_ft.evaluate.harness import evaluate_column

    loaded_suites = load_suites(list(suites))
    model = resolve_model(name, revision, console)
    console.say(f"looking at {model.name} ({model.path})")
    source = ModelSource(model.path, None, ChatFormat(enable_thinking))
    with open_loaded(source) as loaded:
        probe_model(model, loaded, probe_file(model), console)
        if not loaded_suites:
            return
        column = loaded_column(
            "base", loaded, model.identity, batch_size=DEFAULT_BATCH_SIZE, reusable=True
        )
        with (
            tempfile.TemporaryDirectory(prefix="mlx-ft-probe-") as folder,
            suite_progress(console, loaded_suites, 1) as progress,
        ):
            results = evaluate_column(
                loaded_suites,
                column,
                Path(folder),
                progress=progress,
                cache_folder=answers_folder(),
            )
    for result in results:
        mean = result.summary["mean"]
        console.say(f"{result.suite}: {mean:.2f} over {len(result.records)} prompts")


SCHEMA = 1
QUESTIONS = (
    "Hello!",
    "What is the capital of France?",
    "What is 7 plus 5?",
    "Name three colours, separated by commas.",
    "Write a Python function that adds two numbers.",
)
MAX_TOKENS = 96
# Of the answers; a sound model may loop once.
TOO_MANY_DEGENERATE = 2
TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Read a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}
# What a config may say and a person wants to know, by its name there.
CONFIG_FACTS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "sliding_window",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "tie_word_embeddings",
)
CARD_FACTS = re.compile(r"^(license|base_model|pipeline_tag|library_name): *(\S.*)$", re.MULTILINE)


@dataclass(frozen=True)
class ProbeAnswer:
    """An answer of the model to one of QUESTIONS.

    degenerate: why it is degenerate, or None.
    """

    question: str
    text: str
    finish_reason: str
    degenerate: str | None


@dataclass(frozen=True)
class Probe:
    """All findings about a model.

    facts: name -> value, of config and card.
    chat: name -> value, of the chat template.
    """

    model: Mapping[str, Any]
    facts: Mapping[str, Any]
    chat: Mapping[str, Any]
    answers: tuple[ProbeAnswer, ...]


def look_at(model: ResolvedModel, loaded: LoadedModel) -> Probe:
    """Read a model's files and have it answer the questions; `loaded` is that model. Raises
    ModelError.
    """
    renderer = loaded.renderer
    other = replace(renderer.chat, enable_thinking=not renderer.chat.enable_thinking)
    other_mode = ChatRenderer.from_folder(model.path, other)
    return Probe(
        model.info(), model_facts(model), chat_facts(renderer, other_mode), _answers(loaded)
    )


def model_facts(model: ResolvedModel) -> dict[str, Any]:
    """Return the facts of config.json and the model card, and the parameters if known."""
    facts: dict[str, Any] = {"model_type": model.model_type}
    facts |= {name: model.config[name] for name in CONFIG_FACTS if name in model.config}
    shape = model_shape(model.config)
    facts["parameters"] = shape.parameters if shape else None
    facts["adaptable_modules"] = sorted(shape.layer_names) if shape else None
    facts["quantization"] = model.config.get("quantization")
    facts["size_bytes"] = model.size_bytes
    facts["gguf"] = gguf_fault(model.config) or "can be written"
    try:
        card = (model.path / "README.md").read_text(encoding="utf-8", errors="replace")[:4096]
    except OSError:
        card = ""
    return facts | {name: value.strip() for name, value in CARD_FACTS.findall(card)}


def chat_facts(renderer: ChatRenderer, other_mode: ChatRenderer) -> dict[str, Any]:
    """Return how a chat template renders system messages, tools and thinking.

    Also its stop tokens and special tokens.
    other_mode: the same renderer in the other thinking mode.
    """
    asked = {"role": "user", "content": "Hi"}

    def rendered(messages: Sequence[Mapping[str, Any]], tools: Any = None) -> str | None:
        try:
            return renderer.decode_raw(renderer.prompt_ids(messages, tools))
        except RowRefused:
            return None

    with_tool = rendered([asked], [TOOL])
    with_system = rendered([{"role": "system", "content": "Be brief."}, asked])
    fingerprint = renderer.fingerprint()
    return {
        "prompt": rendered([asked]),
        "system_messages": with_system is not None and "Be brief." in with_system,
        "tools": with_tool is not None and "read_file" in with_tool,
        "thinking_modes": renderer.prompt_ids([asked]) != other_mode.prompt_ids([asked]),
        "stop_tokens": [renderer.decode_raw([token]) for token in fingerprint["stop_ids"]],
        "special_tokens": list(fingerprint["special_tokens"]),
    }


def _answers(loaded: LoadedModel) -> tuple[ProbeAnswer, ...]:
    from mlx_ft.engine.generate import generate

    prompts = [
        loaded.renderer.prompt_ids([{"role": "user", "content": text}]) for text in QUESTIONS
    ]
    generations = generate(loaded, prompts, max_tokens=MAX_TOKENS)
    return tuple(
        ProbeAnswer(question, each.text, each.finish_reason, degenerate_reason(each.text, each.ids))
        for question, each in zip(QUESTIONS, generations, strict=True)
    )


def probe_lines(probe: Probe) -> Iterator[str]:
    """Yield the findings for people; nothing of the model can steer their terminal."""
    for name, value in {**probe.facts, **probe.chat}.items():
        if name == "size_bytes":
            value = format_bytes(value)
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, int):
            value = f"{value:,}"
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        elif name == "prompt":
            value = repr(value)
        yield printable(f"{name.replace('_', ' '):24} {'not known' if value is None else value}")
    for answer in probe.answers:
        mark = f"  [{answer.degenerate}]" if answer.degenerate else ""
        yield f"\n> {answer.question}"
        yield printable(f"  {answer.text.strip()}").replace("\n", "\n  ") + mark


def record(probe: Probe, file: Path) -> None:
    """Write down that a model was looked at; raises GateFailed when its answers are degenerate."""
    bad = [answer for answer in probe.answers if answer.degenerate]
    if len(bad) >= TOO_MANY_DEGENERATE:
        fix = "use another model, or its original from the Hub"
        raise GateFailed(
            [Fault(f"probe: {answer.question!r}", f"{answer.degenerate}", fix) for answer in bad]
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"schema": SCHEMA, **asdict(probe)})


def probe_model(model: ResolvedModel, loaded: LoadedModel, file: Path, console: Console) -> None:
    """Look at a model, print the findings, and write them to `file`; see `look_at` and `record`."""
    probe = look_at(model, loaded)
    for line in probe_lines(probe):
        console.say(line)
    record(probe, file)


def probe_file(model: ResolvedModel) -> Path:
    """Return the file that says that `mlx-ft probe` has looked at this model."""
    return cache_home() / "probes" / f"{model.identity}.json"
