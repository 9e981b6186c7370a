"""Every recipe in the tree loads, says what it is for, and keeps the promises of its header."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlx_ft.recipe.load import load_recipe
from mlx_ft.recipe.schema import Recipe
from mlx_ft.recipe.write import dump_resolved
from tests.support.paths import ROOT

RECIPES = sorted((ROOT / "recipes").rglob("*.y*ml"))
HEADINGS = ("What", "Machine", "Time", "Memory", "Score", "Run")
LARGEST_PARAMETERS_PER_ROW = 50_000


def headings(header: str) -> dict[str, str]:
    """Return what a header says under each of its headings."""
    said: dict[str, str] = {}
    name = ""
    for line in header.splitlines():
        found = re.match(r"([A-Z][a-z]+): +(.*)", line)
        if found:
            name = found[1]
            said[name] = found[2]
        else:
            said[name] += f" {line.strip()}"
    return said


def test_no_recipe_is_overlooked() -> None:
    assert [path.relative_to(ROOT / "recipes").as_posix() for path in RECIPES] == [
        "llama-3.2-3b-16gb.yaml",
        "quickstart.yaml",
        "qwen2.5-7b-568-rows.yaml",
        "qwen3-0.6b-20k-2ep-restarts.yaml",
        "qwen3-0.6b-20k.yaml",
        "qwen3-0.6b-5k.yaml",
        "qwen3-14b-news.yaml",
        "tool-agent-qwen3-14b.yaml",
        "tool-agent-qwen3-8b.yaml",
        "tool-agent-qwen3-coder-30b-a3b.yaml",
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_under_its_own_name_and_reads_back(path: Path, tmp_path: Path) -> None:
    loaded = load_recipe(path)
    assert loaded.form == "recipe"
    assert loaded.recipe.name == path.stem
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(dump_resolved(loaded), encoding="utf-8")
    assert load_recipe(resolved).recipe == loaded.recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_what_to_expect(path: Path) -> None:
    loaded = load_recipe(path)
    said = headings(loaded.header)
    assert set(HEADINGS) <= set(said), "a heading is missing"
    assert all(len(text) > 5 for text in said.values())
    relative = path.relative_to(ROOT)
    assert said["Run"] == f"make recipe={relative.as_posix()}"
    data = loaded.recipe.data.path
    if not (ROOT / data).is_dir():
        assert said["Data"].startswith(f"{data}: train.jsonl"), "what the user has to bring"
    assert all(len(line) <= 110 for line in path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_a_recipe_names_in_this_tree_is_there(path: Path) -> None:
    recipe = load_recipe(path).recipe
    assert recipe.eval.suites
    for suite in recipe.eval.suites:
        assert (ROOT / suite).is_file(), suite
    assert "evals/keep_talking.yaml" in recipe.eval.suites, "forgetting goes unseen"


def test_the_gentle_recipe_has_the_values_that_kept_the_model_whole() -> None:
    train = load_recipe(ROOT / "recipes" / "llama-3.2-3b-16gb.yaml").recipe.train
    lora = train.lora_parameters
    assert (train.learning_rate, train.num_layers) == (5e-6, 12)
    assert (lora.rank, lora.alpha, lora.dropout) == (6, 8, 0.1)
    assert (train.grad_accumulation_steps, train.epochs, train.batch_size) == (8, 2, 1)
    assert (train.steps_per_report, train.steps_per_eval, train.save_every) == (50, 50, 500)


def test_the_small_model_recipes_differ_only_as_their_headers_say() -> None:
    first, second, third = (
        load_recipe(ROOT / "recipes" / f"qwen3-0.6b-{name}.yaml").recipe
        for name in ("5k", "20k", "20k-2ep-restarts")
    )

    def change(**values: object) -> dict[str, object]:
        return values

    def notes(recipe: Recipe) -> dict[str, str | None]:
        return {key: getattr(recipe, key) for key in ("name", "hypothesis", "expected")}

    assert second.model_dump() == {
        **first.model_dump(),
        **notes(second),
        "data": {
            **first.data.model_dump(),
            **change(path="data/strandset_rust_20k", max_seq_length=1024),
        },
        "train": {
            **first.train.model_dump(),
            "lora_parameters": {
                **first.train.lora_parameters.model_dump(),
                **change(rank=32, alpha=64.0),
            },
        },
    }
    assert third.model_dump() == {
        **second.model_dump(),
        **notes(third),
        "train": {
            **second.train.model_dump(),
            "epochs": 2,
            "lr_schedule": {
                **second.train.lr_schedule.model_dump(),
                **change(name="cosine_with_restarts", warmup_ratio=0.1, cycles=2),
            },
        },
    }


def test_the_recipe_for_few_rows_keeps_parameters_per_row_below_the_limit() -> None:
    """Qwen2.5-7B: hidden 3584, key and value 512, feed-forward 18944, seven linear modules."""
    train = load_recipe(ROOT / "recipes" / "qwen2.5-7b-568-rows.yaml").recipe.train
    modules = [(3584, 3584), (3584, 512), (3584, 512), (3584, 3584)]
    modules += [(3584, 18944), (3584, 18944), (18944, 3584)]
    per_rank = sum(inputs + outputs for inputs, outputs in modules)
    parameters = per_rank * train.lora_parameters.rank * train.num_layers
    assert parameters == 11_534_336
    assert parameters / 568 < LARGEST_PARAMETERS_PER_ROW
