"""The published model card (README.md), made from a run's measurements.

Does: turn a run's document into Markdown with the front matter that the Hub reads.
Does not: read the run folder, upload anything, or print local paths or credentials.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from mlx_ft.export.card import export_section, thinking_lines
from mlx_ft.model.resolve import HUB_ID
from mlx_ft.report.choice import chosen_words, seeds_words, selected_by
from mlx_ft.runs.document import ordered_columns
from mlx_ft.text import quantities as q
from mlx_ft.text.markdown import cell, public_path, table_lines
from mlx_ft.text.safe import one_line, without_credentials

UNKNOWN = "unknown"
LICENSE_DETAILS = ("license_name", "license_link")


@dataclass(frozen=True)
class CardFacts:
    """Facts of a card that the run's document does not have.

    repo: owner/name on the Hub. column: the model that is published. base_metadata: front matter of
    the base model's own README.
    """

    repo: str
    column: str
    base_metadata: Mapping[str, Any]


def model_card(document: Mapping[str, Any], facts: CardFacts) -> str:
    """Return the card of a finished run's model; `document` is that of `mlx-ft show --json`."""
    document = without_credentials(dict(document))
    sections = (
        _introduction(document, facts),
        _loading(document, facts),
        _scores(document, facts),
        export_section(document["export"], document["survival"], facts.column),
        _data(document),
        _making(document),
        _recipe(document),
    )
    head = front_matter(document, facts).to_yaml()
    body = "\n".join("".join(f"{line}\n" for line in section) for section in sections)
    return f"---\n{head}\n---\n\n{body}"


def front_matter(document: Mapping[str, Any], facts: CardFacts) -> ModelCardData:
    """Return the metadata that the Hub reads; the model has the licence of its base."""
    base, license_id = base_id(document, facts), license_of(facts.base_metadata)
    details = {} if license_id == UNKNOWN else facts.base_metadata
    name, link = (text if _is_text(text := details.get(key)) else None for key in LICENSE_DETAILS)
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "finetune",
        license=license_id,
        license_name=name,
        license_link=link,
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "mlx-ft", _fine_tune_type(document)],
        model_name=facts.repo.partition("/")[2],
        eval_results=eval_results(document, facts.column) or None,
    )


def eval_results(document: Mapping[str, Any], column: str) -> list[EvalResult]:
    """Return the mean score of each suite that the published model answered."""
    scored = {
        suite: columns[column]
        for suite, columns in (document["eval"] or {}).items()
        if q.is_number(columns.get(column, {}).get("mean"))
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=suite,
            dataset_name=suite,
            dataset_args={"prompts": result.get("n")},
            metric_type="mean_score",
            metric_name="mean score (0 to 1)",
            metric_value=result["mean"],
        )
        for suite, result in scored.items()
    ]


def license_of(metadata: Mapping[str, Any]) -> str:
    """Return the licence in a README's front matter, or `unknown`."""
    given = metadata.get("license")
    return str(given) if _is_text(given) else UNKNOWN


def _fine_tune_type(document: Mapping[str, Any]) -> str:
    return str(document["recipe"]["values"]["train"].get("fine_tune_type", "lora"))


def base_id(document: Mapping[str, Any], facts: CardFacts) -> str | None:
    """Return the base model's id on the Hub, or None for a folder without one."""
    model = document["model"]
    if model["source"] == "hub":
        return str(model["name"])
    named = facts.base_metadata.get("base_model")
    return named if isinstance(named, str) and HUB_ID.fullmatch(named) else None


def public_value(value: Any) -> Any:
    """Return a recipe's value without unset keys.

    Paths that lead out of the current folder are cut to their last name.
    """
    if isinstance(value, Mapping):
        return {
            key: entry if key == "regex" else public_value(entry)
            for key, entry in value.items()
            if entry is not None
        }
    if isinstance(value, list):
        return [public_value(entry) for entry in value]
    return public_path(value) if isinstance(value, str) else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _introduction(document: Mapping[str, Any], facts: CardFacts) -> Iterator[str]:
    model, base = document["model"], base_id(document, facts)
    name = {"hub": base, "builtin": f"{base} (as the built-in {model['name']})"}.get(
        model["source"], "a local folder" + (f" of {base}" if base else "")
    )
    kind = {"lora": "LoRA", "dora": "DoRA", "full": "full training of its top layers"}
    version = "commit" if model["source"] == "hub" else "content hash"
    yield f"# {facts.repo.partition('/')[2]}"
    yield ""
    yield (
        f"{cell(name)}, {version} `{one_line(str(model['revision']))}`, fine-tuned with "
        f"{kind.get(_fine_tune_type(document), 'mlx-ft')} by mlx-ft "
        f"{cell(document['environment']['mlx_ft'])} (run `{document['run']}`); this is its "
        f"{facts.column} model."
    )
    yield ""
    yield f"Licence of the base model: {cell(license_of(facts.base_metadata))}."


def _loading(document: Mapping[str, Any], facts: CardFacts) -> Iterator[str]:
    thinking = bool(document["recipe"]["values"]["chat"]["enable_thinking"])
    yield "## How to load it"
    yield ""
    yield from (
        "```python",
        "from mlx_lm import generate, load",
        "",
        f'model, tokenizer = load("{facts.repo}")',
        "prompt = tokenizer.apply_chat_template(",
        '    [{"role": "user", "content": "Hello"}],',
        "    add_generation_prompt=True,",
        f"    enable_thinking={thinking},",
        ")",
        "print(generate(model, tokenizer, prompt=prompt))",
        "```",
        "",
        *thinking_lines(thinking),
    )


def _scores(document: Mapping[str, Any], facts: CardFacts) -> Iterator[str]:
    yield "## Scores"
    yield ""
    if not document["eval"]:
        yield "No evaluation suite was measured."
        return
    rows = []
    for suite, columns in document["eval"].items():
        for column in ordered_columns(columns):
            result = columns[column]
            interval = q.interval(result.get("low"), result.get("high")).replace(
                "\N{EN DASH}", " to "
            )
            shown = f"{column} (this model)" if column == facts.column else column
            rows.append([suite, shown, q.score(result.get("mean")), interval, result.get("n")])
    yield from table_lines(
        ["suite", "model", "mean score (0 to 1)", "95 % interval", "prompts"], rows
    )
    yield ""
    yield (
        "Greedy answers. base: before training; adapter: base with the trained adapter; fused: "
        "both in one, 16 bits; quantized: that one again, with fewer bits."
    )


def _data(document: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for split, facts in document["data"]["splits"].items():
        files = [
            f"{public_path(str(source['path']))} {source['sha256']}"
            for source in facts.get("sources") or []
        ]
        counts = [q.count(facts.get(key)) for key in ("rows", "tokens", "trained_tokens")]
        rows.append([split, *counts, ", ".join(files) or q.NOT_RECORDED])
    yield "## Data"
    yield ""
    yield from table_lines(["split", "rows", "tokens", "trained tokens", "files (sha256)"], rows)


def _making(document: Mapping[str, Any]) -> Iterator[str]:
    info, made_with = document["train"]["info"], document["environment"]
    versions = ", ".join(f"{key} {made_with.get(key)}" for key in ("mlx", "mlx_lm", "python"))
    rows = [
        ["trained parameters", q.count(info.get("trainable_parameters"))],
        ["mini-batches", q.count(info.get("iterations"))],
        ["optimizer updates", q.count(info.get("updates"))],
        ["first validation loss", q.loss(info.get("first_validation_loss"))],
        ["final validation loss", q.loss(info.get("final_validation_loss"))],
        *_choice(document),
        ["begun", q.moment(document["timings"]["created"])],
        ["made with", f"{versions}, on {made_with.get('device')}"],
    ]
    yield "## Training"
    yield ""
    yield from table_lines(["", ""], rows)


def _choice(document: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield rows on the choice of weights and seed, if there was a choice."""
    info, by = document["train"]["info"], selected_by(document)
    if by is not None:
        yield ["weights taken", chosen_words(info, by)]
    if info.get("seeds"):
        yield ["seeds", seeds_words(info["seeds"])]


def _recipe(document: Mapping[str, Any]) -> Iterator[str]:
    values = public_value(document["recipe"]["values"])
    yield "## Recipe"
    yield ""
    yield "Every value (JSON is YAML too); a path that leads elsewhere is cut to its last name."
    yield ""
    yield "```json"
    yield json.dumps(values, indent=1, ensure_ascii=True).replace("`", "\\u0060")
    yield "```"
