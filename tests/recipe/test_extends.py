"""A recipe that extends another is that one with its own values, each of known origin."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_ft.errors import RecipeError
from mlx_ft.recipe.extends import MOST_PARENTS
from mlx_ft.recipe.keys import dotted, value_keys
from mlx_ft.recipe.load import load_recipe
from mlx_ft.recipe.write import dump_resolved, yaml_text
from tests.support.recipes import MINIMAL

PARENT = MINIMAL + (
    "name: parent\nhypothesis: it works\nexpected: 0.9 or more\n"
    "train:\n  epochs: 3\n  seed: 4\n  optimizer: adamw\n  optimizer_config: {weight_decay: 0.1}\n"
    "  lora_parameters: {rank: 4, alpha: 8}\n  lr_schedule: {name: cosine, warmup_ratio: 0.1}\n"
    "eval: {suites: [a.yaml, b.yaml]}\n"
)


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / "child.yaml"


def faults(path: Path, *sets: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, sets)
    return [str(fault).replace(f"{path.parent}/", "") for fault in caught.value.faults]


def test_own_values_lie_over_the_parents_and_say_where_they_stand(tmp_path: Path) -> None:
    child = "extends: parent.yaml\ntrain:\n  learning_rate: 2e-5\n  lora_parameters: {rank: 16}\n"
    loaded = load_recipe(write(tmp_path, parent=PARENT, child=child))
    train = loaded.recipe.train
    assert (train.learning_rate, train.lora_parameters.rank, train.epochs) == (2e-5, 16, 3)
    assert train.lora_parameters.alpha == 8
    origins = loaded.origins
    assert origins["train.learning_rate"] == f"{tmp_path}/child.yaml:3"
    assert origins["train.lora_parameters.rank"] == f"{tmp_path}/child.yaml:4"
    assert origins["train.lora_parameters.alpha"].startswith(f"{tmp_path}/parent.yaml:")
    assert origins["model"] == f"{tmp_path}/parent.yaml:1"
    (note,) = loaded.notes
    assert "parent.yaml; changed: train.learning_rate, train.lora_parameters.rank" in note


def test_name_and_expectations_are_a_recipes_own(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, parent=PARENT, child="extends: parent.yaml\n")).recipe
    parent = load_recipe(tmp_path / "parent.yaml").recipe
    assert (recipe.name, recipe.hypothesis, recipe.expected) == ("child", None, None)
    own = {"name": recipe.name, "hypothesis": None, "expected": None}
    assert parent.model_copy(update=own) == recipe
    assert parent.hypothesis == "it works"


def test_lists_and_options_are_replaced_whole_and_sets_come_last(tmp_path: Path) -> None:
    child = (
        "extends: parent.yaml\neval: {suites: [c.yaml]}\n"
        "train: {optimizer: sgd, optimizer_config: {momentum: 0.9}}\n"
    )
    loaded = load_recipe(write(tmp_path, parent=PARENT, child=child), ["train.epochs=9"])
    assert loaded.recipe.eval.suites == ["c.yaml"]
    assert loaded.recipe.train.optimizer_config == {"momentum": 0.9}
    assert loaded.recipe.train.epochs == 9 and loaded.origins["train.epochs"] == "--set"


@pytest.mark.parametrize(
    ("own", "gone", "kept"),
    [
        ("train: {iters: 5}", "epochs", None),
        ("train: {lora_parameters: {scale: 3}}", "lora_parameters.alpha", None),
        ("train: {lr_schedule: {warmup_steps: 1}}", "lr_schedule.warmup_ratio", None),
        ("train: {seeds: [1, 2]}", "seed", 0),
    ],
)
def test_of_two_ways_to_say_it_the_childs_counts(
    tmp_path: Path, own: str, gone: str, kept: int | None
) -> None:
    recipe = load_recipe(
        write(tmp_path, parent=PARENT, child=f"extends: parent.yaml\n{own}\n")
    ).recipe
    value: Any = recipe.train
    for part in gone.split("."):
        value = getattr(value, part)
    assert value == kept


def test_an_empty_section_changes_nothing(tmp_path: Path) -> None:
    child = "extends: parent.yaml\ntrain:\neval:\n"
    recipe = load_recipe(write(tmp_path, parent=PARENT, child=child)).recipe
    assert recipe.train == load_recipe(tmp_path / "parent.yaml").recipe.train


VALUES: Mapping[str, st.SearchStrategy[Any]] = {
    "train.batch_size": st.integers(1, 9),
    "train.learning_rate": st.sampled_from([1e-5, 2e-4]),
    "train.lora_parameters.rank": st.integers(1, 9),
    "train.lr_schedule.name": st.sampled_from(["cosine", "linear"]),
    "data.max_seq_length": st.integers(8, 99),
    "data.drop": st.lists(st.sampled_from(["duplicates", "secrets"]), max_size=2, unique=True),
    "eval.limit": st.none() | st.integers(1, 9),
    "train.optimizer_config": st.sampled_from([{}, {"eps": 1e-6}]),
}
LAYERS = st.lists(st.fixed_dictionaries({}, optional=dict(VALUES)), min_size=1, max_size=4)


@given(layers=LAYERS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_chain_is_the_parent_with_every_change_set_in_order(
    tmp_path: Path, layers: list[dict[str, Any]]
) -> None:
    """The nearest file that gives a value has it; so the run of a chain is that of `--set`s."""
    (tmp_path / "r0.yaml").write_text(MINIMAL)
    for number, layer in enumerate(layers, start=1):
        nested: dict[str, Any] = {"extends": f"r{number - 1}.yaml"}
        for key, value in layer.items():
            *parents, last = key.split(".")
            node = nested
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
        (tmp_path / f"r{number}.yaml").write_text(yaml_text(nested))
    loaded = load_recipe(tmp_path / f"r{len(layers)}.yaml", ["name=same"])
    sets = [f"{key}={yaml_text(value)}" for layer in layers for key, value in layer.items()]
    assert loaded.recipe == load_recipe(tmp_path / "r0.yaml", ["name=same", *sets]).recipe
    for key in VALUES:
        given = [n for n, layer in enumerate(layers, start=1) if key in layer]
        wanted = f"{tmp_path}/r{given[-1]}.yaml:1" if given else "default"
        assert loaded.origins[key] == wanted
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_resolved(loaded))
    assert load_recipe(resolved).recipe == loaded.recipe
    assert {dotted(key) for key in value_keys()} == set(loaded.origins)


def test_a_circle_is_named(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        child="\nextends: parent.yaml\n",
        parent="model: m\nextends: grand.yaml\n",
        grand="extends: child.yaml\n",
    )
    (fault,) = [line for line in faults(path) if "extends itself" in line]
    assert fault.startswith("grand.yaml:1 extends: it extends itself (child.yaml -> parent.yaml")
    own = write(tmp_path, child="extends: child.yaml\n")
    assert any("child.yaml -> child.yaml" in line for line in faults(own))


def test_a_parent_that_cannot_be_read_is_named_with_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, child="model: m\nextends: parnt.yaml\n", parent=PARENT)
    lines = faults(path)
    assert lines[0].startswith("child.yaml:2 extends: parnt.yaml does not exist")
    assert "did you mean parent.yaml?" in lines[0]
    for wrong in ("[a.yaml]", "", "3", "."):
        path = write(tmp_path, child=f"extends: {wrong}\n")
        assert any(line.startswith("child.yaml:1 extends: ") for line in faults(path)), wrong


def test_faults_of_a_parent_are_told_beside_the_childs(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        child="extends: parent.yaml\ntrain: {batch_size: none}\n",
        parent=MINIMAL + "train:\n  learning_rte: 1\n  epochs: 0\n",
    )
    lines = faults(path)
    assert any(line.startswith("child.yaml:2 train.batch_size") for line in lines)
    assert any(line.startswith("parent.yaml:4 train.learning_rte") for line in lines)
    assert any(line.startswith("parent.yaml:5 train.epochs") for line in lines)


def test_a_conflict_between_the_two_is_told_at_the_childs_line(tmp_path: Path) -> None:
    child = "extends: parent.yaml\ntrain: {lr_schedule: {name: constant, end: 1e-6}}\n"
    (line,) = faults(write(tmp_path, parent=PARENT, child=child))
    assert line.startswith("child.yaml:2") and "constant rate does not decay" in line


def test_a_chain_has_an_end(tmp_path: Path) -> None:
    (tmp_path / "r0.yaml").write_text(MINIMAL)
    for number in range(1, MOST_PARENTS + 2):
        (tmp_path / f"r{number}.yaml").write_text(f"extends: r{number - 1}.yaml\n")
    assert load_recipe(tmp_path / f"r{MOST_PARENTS}.yaml").recipe.model == "m"
    lines = faults(tmp_path / f"r{MOST_PARENTS + 1}.yaml")
    assert any("r1.yaml:1 extends: more than 8 recipes" in line for line in lines)


def test_an_mlx_lm_file_is_not_extended(tmp_path: Path) -> None:
    path = write(tmp_path, child="extends: flat.yaml\n", flat="model: m\niters: 5\nrank: 3\n")
    assert any("is an mlx-lm file" in line and "upgrade" in line for line in faults(path))
