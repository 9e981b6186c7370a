"""Loading: every fault at once with its place, the origin of every value, and the way back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mlx_ft.errors import RecipeError
from mlx_ft.recipe.keys import dotted, section_keys, section_of, value_at, value_keys
from mlx_ft.recipe.load import LoadedRecipe, load_recipe
from mlx_ft.recipe.names import COLUMNS
from mlx_ft.recipe.optimizers import OPTIMIZER_OPTIONS, optimizer_option_faults
from mlx_ft.recipe.schema import Recipe
from mlx_ft.recipe.strict_yaml import read_yaml
from mlx_ft.recipe.write import dump_resolved, upgrade_text, yaml_text
from tests.support.recipes import MINIMAL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def load(folder: Path, text: str, *sets: str, name: str = "r.yaml") -> LoadedRecipe:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, sets)


def faults(folder: Path, text: str, *sets: str) -> list[str]:
    """Return all faults, with the folder's name taken out."""
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *sets)
    assert caught.value.exit_code == 2
    lines = [str(fault).replace(f"{folder}/", "") for fault in caught.value.faults]
    assert all("\n" not in line for line in lines)
    return lines


def test_a_minimal_recipe_has_every_default(folder: Path) -> None:
    loaded = load(folder, MINIMAL, name="my run.v2.yaml")
    expected = Recipe.model_validate({"name": "my-run.v2", "model": "m", "data": {"path": "d"}})
    assert loaded.recipe == expected
    assert (loaded.form, loaded.notes, loaded.adapter_path) == ("recipe", (), None)
    assert loaded.file == folder / "my run.v2.yaml"


@pytest.mark.parametrize(
    ("file", "name"),
    [("..yaml", "recipe"), ("-a.yaml", "a"), ("é.yaml", "recipe"), ("x" * 99 + ".yml", "x" * 80)],
)
def test_the_name_comes_from_the_file_and_always_fits(folder: Path, file: str, name: str) -> None:
    assert load(folder, MINIMAL, name=file).recipe.name == name


def test_every_value_has_an_origin(folder: Path) -> None:
    text = (
        "# What it is for.\n#\n# More.\n\nmodel: m\ndata:\n  path: d\ntrain:\n"
        "  lora_parameters: {rank: 4}\n  optimizer_config:\n    eps: 1e-6\n"
    )
    loaded = load(folder, text, "train.batch_size=2", "train.optimizer_config.eps=1e-7")
    origins = {key: origin.replace(f"{folder}/", "") for key, origin in loaded.origins.items()}
    assert set(origins) == {dotted(key) for key in value_keys()}
    given = {key: origin for key, origin in origins.items() if origin != "default"}
    assert given == {
        "name": "derived",
        "model": "r.yaml:5",
        "data.path": "r.yaml:7",
        "train.lora_parameters.rank": "r.yaml:9",
        "train.batch_size": "--set",
        "train.optimizer_config": "--set",
    }
    assert loaded.header == "What it is for.\n\nMore."
    assert loaded.recipe.train.optimizer_config == {"eps": 1e-7}


def test_all_faults_come_at_once_in_the_order_of_the_lines(folder: Path) -> None:
    text = """name: "a b"
modle: m
data: folder
learning_rate: 1e-5
train:
  batch_size: true
  lr: 1e-4
  epochs: 2
  iters: 10
  optimizer: adamm
  lora_parameters: {rank: 0, alpha: 16, scale: 2}
  seed: 1
  seed: 2
chat: {enable_thinking: "no"}
export: {q_bits: 7}
eval: {suites: x, columns: [base, bas]}
"""
    found = faults(folder, text, "train.max_length=3", "novalue")
    starts = [
        "r.yaml:1 name: 'a b' cannot name a folder",
        "r.yaml:2 modle: is not a known key - did you mean model?",
        "r.yaml:3 data: 'folder' is not a section - write data: {path: folder}",
        "r.yaml:4 learning_rate: is not a known key - did you mean train.learning_rate?",
        "r.yaml:6 train.batch_size: true is not a whole number",
        "r.yaml:7 train.lr: is not a known key - did you mean train.learning_rate?",
        "r.yaml:8 train.epochs: epochs and iters are both given",
        "r.yaml:10 train.optimizer: 'adamm' is not one of",
        "r.yaml:11 train.lora_parameters.rank: 0 is out of range - use at least 1",
        "r.yaml:11 train.lora_parameters.alpha: alpha and scale are both given",
        "r.yaml:13 train.seed: is given again (first in line 12)",
        "r.yaml:14 chat.enable_thinking: 'no' is not true or false",
        "r.yaml:15 export.q_bits: 7 is not one of 4, 5, 6, 8, auto",
        "r.yaml:16 eval.suites: 'x' is not a list",
        "r.yaml:16 eval.columns.1: 'bas' is not one of",
        "--set 'novalue': is not KEY=VALUE",
        "--set train.max_length: is not a known key - did you mean data.max_seq_length?",
    ]
    assert [line[: len(start)] for line, start in zip(found, starts, strict=True)] == starts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {path: d}", ["r.yaml model: is missing"]),
        ("model: m\ndata:\n", ["r.yaml:2 data: is missing"]),
        ("model: m\ndata: {mask_prompt: true}", ["r.yaml:2 data.path: is missing"]),
        ("model:\ndata: {path: d}", ["r.yaml:1 model: null is not text"]),
        (MINIMAL + "name: no\n", ["r.yaml:3 name: false is not text"]),
        (
            MINIMAL + "preflight:\n  accept:\n    capacity: x\n    speed: x\n",
            ["r.yaml:6 preflight.accept.speed: 'speed' is not one of capacity, family"],
        ),
        (MINIMAL + "train: 3\n", ["r.yaml:3 train: 3 is not a section"]),
        (MINIMAL + "train.seed: 3\n", ["r.yaml:3 train.seed: is not a known key - write sections"]),
        (MINIMAL + "chat: {date: 2025-02-30}", ["r.yaml:3 chat.date: '2025-02-30' is not a day"]),
        (MINIMAL + "chat: {date: today}", ["r.yaml:3 chat.date: 'today' is not a date"]),
        (MINIMAL + "train: {learning_rate: .inf}", ["r.yaml:3 train.learning_rate: inf is not a"]),
        (MINIMAL + "train: {optimizer_config: 3}", ["r.yaml:3 train.optimizer_config: 3 is not a"]),
        (
            MINIMAL + "flavour: q8_0\n",
            ["r.yaml:3 flavour: is not a known key - the keys here are name"],
        ),
        ("a: [1", ["r.yaml:1: is not YAML"]),
        ("", ["r.yaml: is empty"]),
    ],
)
def test_a_fault_says_where_and_what(folder: Path, text: str, expected: list[str]) -> None:
    found = faults(folder, text)
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected


def test_sections_without_values_mean_the_defaults(folder: Path) -> None:
    text = MINIMAL + "train:\n  lr_schedule:\nexport:\n"
    assert load(folder, text).recipe == load(folder, MINIMAL).recipe


def test_numbers_may_be_written_as_text(folder: Path) -> None:
    text = MINIMAL + "train: {learning_rate: '1e-5', batch_size: '2', warmup: 1}"
    assert "train.warmup" in faults(folder, text)[0]
    loaded = load(folder, text.replace(", warmup: 1", ""))
    assert (loaded.recipe.train.learning_rate, loaded.recipe.train.batch_size) == (1e-5, 2)


def test_a_set_repairs_a_fault_of_the_file(folder: Path) -> None:
    text = "model: m\ntrain: {epochs: 2, batch_size: none}\n"
    assert len(faults(folder, text, "train.iters=5")) == 3
    loaded = load(
        folder, text, "data.path=d", "train.epochs=null", "train.iters=5", "train.batch_size=1"
    )
    assert (loaded.recipe.train.epochs, loaded.recipe.train.iters) == (None, 5)


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("train.learning_rate=1e-3", "train.learning_rate", 1e-3),
        ("eval.columns=[base]", "eval.columns", ["base"]),
        ("train.lora_parameters={rank: 3}", "train.lora_parameters.rank", 3),
        ("train.optimizer_config={eps: 1e-6}", "train.optimizer_config", {"eps": 1e-6}),
        ("model=a=b", "model", "a=b"),
        ("model=~/x", "model", "~/x"),
        ("train.prefix_cache=off", "train.prefix_cache", "off"),
        ("train.resume_adapter_file=", "train.resume_adapter_file", None),
    ],
)
def test_a_set_is_yaml_and_wins(folder: Path, setting: str, key: str, value: Any) -> None:
    loaded = load(folder, MINIMAL + "train: {learning_rate: 1}\n", setting)
    assert value_at(loaded.recipe, tuple(key.split("."))) == value
    assert loaded.origins[key] == "--set"


def documented_choices() -> list[tuple[str, str]]:
    """Return (key, word) for each word that a key of the recipe may have."""
    found = []
    for key in value_keys():
        if key == ("train", "select", "metric"):
            continue  # most of its words want a suite beside them
        section = section_of(key[:-1])
        assert section is not None
        schema = section.model_json_schema()["properties"][key[-1]]
        for option in schema.get("anyOf", [schema]):
            found += [(dotted(key), word) for word in option.get("enum", ())]
    return found


@pytest.mark.parametrize(("key", "word"), documented_choices())
def test_a_documented_word_can_be_written_without_quotes(folder: Path, key: str, word: str) -> None:
    """Also where YAML reads a switch in it, as in `off`."""
    loaded = load(folder, MINIMAL, f"{key}={word}")
    assert value_at(loaded.recipe, tuple(key.split("."))) == word


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("lr=1", "--set lr: is not a known key - did you mean train.learning_rate?"),
        ("train.lr_schedule.nam=x", "did you mean train.lr_schedule.name?"),
        ("model.name=x", "--set model.name: name lies inside a value - set model as a whole"),
        ("eval.suites.0=x", "0 lies inside a value"),
        ("train..seed=1", "is not KEY=VALUE"),
        ("=1", "is not KEY=VALUE"),
        ("train.seed=[1", "--set train.seed: is not YAML"),
        ("train.seed={a: 1, a: 2}", "--set train.seed: is given again"),
        ("train.prefix_cache=on", "true is not one of disk, memory, off"),
        ("preflight.accept={speed: x}", "--set preflight.accept.speed: 'speed' is not one of"),
        ("train.seed=x", "--set train.seed: 'x' is not a whole number"),
        ("data=x", "--set data: 'x' is not a section - write data: {path: x}"),
    ],
)
def test_a_wrong_set_is_one_fault(folder: Path, setting: str, words: str) -> None:
    (line,) = faults(folder, MINIMAL, setting)
    assert words in line


def test_files_that_are_not_there_suggest_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match=r"does not exist - did you mean .*quickstart.yaml\?"):
        load_recipe(tmp_path / "quickstrat.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="does not exist - check the path"):
        load_recipe(tmp_path / "no" / "such")


def test_very_many_faults_are_counted(folder: Path) -> None:
    found = faults(folder, MINIMAL + "".join(f"key{index}: 1\n" for index in range(150)))
    assert found[-1] == "r.yaml: 50 more faults - mend the others first"


NAMES = [name for key in [*value_keys(), *section_keys()] for name in key]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["1e-5", "adam", "cosine", "base", "nan", "9" * 400, 10**400])
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=6)
    ),
    max_leaves=20,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tree=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), TREES, max_size=8),
    flat=st.booleans(),
)
def test_any_yaml_gives_a_recipe_or_a_recipe_error(folder: Path, tree: Any, flat: bool) -> None:
    if flat:
        tree = {**tree, "iters": tree.get("iters", 3)}
    try:
        loaded = load(folder, yaml.safe_dump(tree, allow_unicode=True))
    except RecipeError as error:
        assert all(fault.where and fault.found and fault.fix for fault in error.faults)
    else:
        assert load(folder, dump_resolved(loaded)).recipe == loaded.recipe


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(), setting=st.text())
def test_any_text_gives_a_recipe_or_a_recipe_error(folder: Path, text: str, setting: str) -> None:
    path = folder / "any.yaml"
    path.write_bytes(text.encode("utf-8", "replace"))
    with pytest.raises(RecipeError):
        load_recipe(path, [setting])
    path.write_text(MINIMAL)
    with pytest.raises(RecipeError):
        load_recipe(path, [setting])


Sections = st.SearchStrategy[dict[str, Any]]


def section(
    needed: dict[str, st.SearchStrategy[Any]],
    optional: dict[str, st.SearchStrategy[Any]] | None = None,
) -> Sections:
    return st.fixed_dictionaries(needed, optional=optional or {})


def both(one: Sections, other: Sections) -> Sections:
    return st.tuples(one, other).map(lambda parts: {**parts[0], **parts[1]})


def options_of(optimizer: str) -> Sections:
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "a number": st.floats(0, 1, exclude_max=True),
        "a whole number": st.integers(1, 9),
        "two numbers": st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
        "true or false": st.booleans(),
    }
    known = OPTIMIZER_OPTIONS[optimizer]
    options = section({}, optional={name: kinds[known[name]] for name in known})
    return options.filter(lambda values: not optimizer_option_faults(optimizer, values))


TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1)
WHOLE = st.integers(1, 10**6)
STRENGTHS: Sections = st.sampled_from(
    [{}, {"alpha": 3.5}, {"scale": 1e-9}, {"alpha": 16, "scale": None}]
)
LENGTHS: Sections = st.sampled_from(
    [{}, {"epochs": 3}, {"iters": 10**6}, {"epochs": None, "iters": 1}]
)
SHAPES: Sections = st.sampled_from(
    [
        {},
        {"name": "linear", "warmup_ratio": 0.1, "end": 1e-12},
        {"name": "cosine_with_restarts", "cycles": 3, "warmup_steps": 0},
        {"name": "cosine", "decay_steps": 10**9, "allow_unfinished": True},
    ]
)
RECIPES: Sections = st.sampled_from(sorted(OPTIMIZER_OPTIONS)).flatmap(
    lambda optimizer: section(
        {
            "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
            "model": TEXT,
            "data": section(
                {"path": TEXT}, optional={"max_seq_length": WHOLE.map(lambda count: count + 8)}
            ),
            "train": both(
                LENGTHS,
                section(
                    {
                        "optimizer": st.just(optimizer),
                        "learning_rate": st.floats(1e-12, 10),
                        "lr_schedule": SHAPES,
                        "optimizer_config": options_of(optimizer),
                        "lora_parameters": both(
                            STRENGTHS,
                            section(
                                {},
                                optional={
                                    "rank": WHOLE,
                                    "dropout": st.floats(0, 1, exclude_max=True),
                                    "keys": st.none() | st.lists(TEXT, min_size=1, max_size=3),
                                },
                            ),
                        ),
                    },
                    optional={"batch_size": WHOLE, "resume_adapter_file": st.none() | TEXT},
                ),
            ),
            "eval": section(
                {
                    "suites": st.lists(TEXT, unique=True, max_size=3),
                    "columns": st.lists(st.sampled_from(COLUMNS), unique=True, min_size=1),
                }
            ),
        },
        optional={"revision": TEXT, "chat": st.just({"date": "2024-02-29"})},
    )
)


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(values=RECIPES)
def test_what_is_written_out_loads_as_an_equal_recipe(folder: Path, values: Any) -> None:
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:  # a warm-up that leaves no update of one iteration
        assert re.search("(longer than|as long as) the run", str(error))
        return
    origins = {dotted(key): "default" for key in value_keys()}
    loaded = LoadedRecipe(recipe, origins, Path("r.yaml"), (), "recipe", "", None)
    for text in (dump_resolved(loaded), upgrade_text(loaded)):
        assert load(folder, text).recipe == recipe
    resolved = dump_resolved(loaded)
    plain = yaml.safe_load(resolved)
    assert Recipe.model_validate(plain) == recipe


ON_ONE_LINE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cc", "Cs"))),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(ON_ONE_LINE)
def test_a_value_on_one_line_reads_as_itself(value: Any) -> None:
    text = yaml_text(value)
    assert "\n" not in text
    reading = read_yaml(text, "")
    assert not reading.faults
    assert json.dumps(reading.value) == json.dumps(value)


def test_resolved_lines_carry_their_origin(folder: Path) -> None:
    text = dump_resolved(load(folder, MINIMAL, "train.seed=3"))
    lines = {line.split("#")[0].strip(): line.split("# ")[-1] for line in text.splitlines()}
    assert lines["model: m"].endswith("r.yaml:1")
    assert lines["seed: 3"] == "--set"
    assert lines["name: r"] == "derived"
    assert lines["epochs: 2"] == "default"


def test_a_file_with_an_unspeakable_name_is_written_out_on_one_line(folder: Path) -> None:
    loaded = load(folder, MINIMAL, name="a\nb \x1b.yaml")
    assert loaded.recipe.name == "a-b-"
    for text in (dump_resolved(loaded), upgrade_text(loaded)):
        assert load(folder, text).recipe == loaded.recipe


def test_loading_a_recipe_imports_nothing_heavy() -> None:
    heavy = "('mlx', 'mlx_lm', 'transformers', 'numpy', 'click', 'huggingface_hub')"
    script = f"import sys, mlx_ft.recipe.load; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
