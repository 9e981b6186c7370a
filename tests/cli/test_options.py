"""A command that is printed is the command that was meant, whatever stands in it."""

import shlex
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.cli.options import DEFAULT_RUNS, command_line, recipe_command
from mlx_ft.cli.prepare import check
from mlx_ft.cli.runs import clean

WORDS = st.sampled_from(
    ["r.yaml", "my recipe.yaml", "-r.yaml", "it's", "$HOME", "train.seed=1", "a=[b, 'c']", "*"]
)


@given(
    recipe=WORDS, sets=st.lists(WORDS, max_size=3), runs=st.just("runs") | WORDS, fit=st.booleans()
)
def test_a_recipes_next_command_reads_back_as_the_same_arguments(
    recipe: str, sets: list[str], runs: str, fit: bool
) -> None:
    line = recipe_command("check", Path(recipe), tuple(sets), Path(runs), fit)
    program, verb, *arguments = shlex.split(line)
    assert (program, verb) == ("mlx-ft", "check")
    given_back = check.make_context("check", arguments).params
    assert given_back == {
        "recipe": Path(recipe),
        "sets": tuple(sets),
        "runs_root": Path(runs),
        "fit": fit,
    }


def test_what_is_the_default_or_not_asked_is_not_printed() -> None:
    assert recipe_command("run", Path("r.yaml"), (), DEFAULT_RUNS) == "mlx-ft run r.yaml"
    assert command_line("runs", (), {"--newest": None, "--json": False}) == "mlx-ft runs"


@given(age=st.floats(0, 1e6))
def test_an_age_reads_back_as_it_was(age: float) -> None:
    arguments = shlex.split(command_line("clean", (), {"--older-than": age}))[2:]
    assert clean.make_context("clean", arguments).params["older_than"] == age
