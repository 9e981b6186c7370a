"""The generated documentation says what the code declares, and a difference is found."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from docs.generate import cli_reference, main, recipe_keys, rewritten, suites, table
from mlx_ft.recipe.keys import dotted, value_keys
from tests.support.paths import ROOT


@click.group()
def sample() -> None:
    """Sample commands."""


@sample.command()
@click.argument("recipe")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a | value.")
@click.option("--runs", default="runs", help="Folder of runs.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--column", type=click.Choice(["base", "fused"]), help="Which model.")
@click.option("--secret", hidden=True, help="Not told.")
def run(**_: object) -> None:
    """Do it all.

    And more.
    """


@sample.group()
def inner() -> None:
    """Inner commands."""


@inner.command()
def leaf() -> None:
    """Deeper."""


@sample.command(hidden=True)
def ghost() -> None:
    """Unseen."""


def rows_of(markdown: str) -> dict[str, list[str]]:
    cells = [re.split(r"(?<!\\) *\| *", line)[1:-1] for line in markdown.splitlines()]
    return {row[0].strip("`"): row[1:] for row in cells[2:] if row}


def test_every_recipe_key_has_a_row_with_its_meaning() -> None:
    rows = rows_of(recipe_keys())
    assert list(rows) == [dotted(key) for key in value_keys()]
    assert all(kind and meaning for kind, _, meaning in rows.values())


def test_types_limits_and_defaults_are_those_of_the_schema() -> None:
    rows = rows_of(recipe_keys())
    assert rows["data.path"][:2] == ["text", "required"]
    assert rows["name"][1] == ""
    assert rows["train.batch_size"][:2] == ["whole number at least 1", "`4`"]
    assert rows["train.epochs"][:2] == ["whole number at least 1", ""]
    assert rows["train.lora_parameters.dropout"][0] == "number at least 0 and below 1"
    assert rows["train.lora_parameters.alpha"][0] == "number more than 0"
    assert rows["data.mask_prompt"][:2] == ["true, false", "`true`"]
    assert rows["export.q_bits"][:2] == ["`4`, `5`, `6`, `8`, `auto`", "`5`"]
    assert rows["eval.columns"][1] == "`[base, adapter, fused, quantized]`"


def test_every_command_that_is_shown_is_described() -> None:
    text = cli_reference(sample, "tool")
    assert "**`tool run RECIPE [OPTIONS]`**: Do it all. And more." in text
    assert "| `--set` KEY=VALUE | Override a \\| value. |" in text
    assert "| `--runs` TEXT | Folder of runs. Default: runs. |" in text
    assert "| `--json` | As JSON. |" in text
    assert "| `--column` base/fused | Which model. |" in text
    assert "tool inner leaf" in text
    assert "ghost" not in text
    assert "secret" not in text


def test_the_suites_of_this_tree_are_counted() -> None:
    rows = rows_of(suites(ROOT / "evals"))
    assert list(rows) == [f"evals/{path.name}" for path in sorted((ROOT / "evals").glob("*.yaml"))]
    for name, (prompts, scorer, meaning) in rows.items():
        lines = (ROOT / name).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
        assert int(prompts) == len(lines)
        assert scorer.startswith("`")
        assert len(meaning) > 20


def test_a_table_stays_a_table_whatever_is_in_it() -> None:
    lines = table(["a", "b"], [["x | y", "two\nlines"]]).splitlines()
    assert lines == ["| a | b |", "| --- | --- |", "| x \\| y | two lines |"]


def test_only_the_blocks_are_rewritten() -> None:
    text = "before\n<!-- generated:one -->\nold\n<!-- /generated -->\nafter\n"
    new = rewritten(text, {"one": lambda: "new\n"})
    assert new == text.replace("old", "new")
    assert rewritten(new, {"one": lambda: "new\n"}) == new


@pytest.mark.parametrize(
    "text",
    [
        "no block at all",
        "<!-- generated:two -->\n<!-- /generated -->",
        "<!-- generated:one -->\nnever closed",
    ],
)
def test_blocks_that_cannot_be_written_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="generated"):
        rewritten(text, {"one": lambda: "new\n"})


def test_check_finds_a_difference_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "reference.md"
    names = ("recipe-keys", "cli", "suites")
    blocks = [f"<!-- generated:{name} -->\n<!-- /generated -->\n" for name in names]
    page.write_text("# Title\n" + "\n".join(blocks))
    before = page.read_text()
    assert main([str(page), "--check"]) == 1
    assert "differ from the code - run python docs/generate.py" in capsys.readouterr().err
    assert page.read_text() == before
    assert main([str(page)]) == 0
    assert "train.batch_size" in page.read_text()
    assert main([str(page), "--check"]) == 0
    page.write_text(page.read_text().replace("Rows a mini-batch.", "Rows."))
    assert main([str(page), "--check"]) == 1
    assert main([str(tmp_path / "absent.md"), "--check"]) == 2
