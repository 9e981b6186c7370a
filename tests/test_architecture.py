"""The house stays livable: imports point down, third parties behind walls, small files."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mlx_ft"
# A file imports its own room and the rooms to the left of it.
LAYERS = (
    "errors text system recipe runs model engine job data evaluate preflight train export "
    "report deploy doctor inputs pipeline rehearse sweep cli"
).split()
MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_FILES_AT_THE_TOP = 8
MAX_FILES_IN_A_FOLDER = 25
MAX_LEVELS = 3
# Third-party package -> the rooms, or single modules, that may import it.
WALLS = {
    "click": ("cli",),
    "pydantic": ("recipe", "evaluate"),
    "pydantic_core": ("recipe", "evaluate"),
    "yaml": ("recipe",),
    "jinja2": ("report", "model.chat"),
    "matplotlib": ("report",),
    "transformers": ("model",),
    "tokenizers": ("model",),
    "datasets": ("data",),
    "pyarrow": ("data",),
    "gguf": ("export", "deploy"),
    "lm_eval": ("evaluate",),
    "jsonschema": ("evaluate",),
    "referencing": ("evaluate",),
    "mlx_lm": (
        "engine",
        "evaluate.lm_eval_model",
        "train",
        "export",
        "deploy",
        "doctor",
        "rehearse",
    ),
    **dict.fromkeys(("trackio", "wandb", "tensorboardX", "mlflow", "swanlab"), ("report",)),
}
# Rooms that may need MLX as soon as one of their modules is imported, and one module that is run.
WITH_MLX = ("engine", "train", "export", "deploy.server_process", "doctor")
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc", "base"}


def modules_in(package: Path) -> dict[str, Path]:
    """Return module name -> file, of every module below a package's folder."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in sorted(package.rglob("*.py"))
    }


MODULES = modules_in(PACKAGE)


def imports_of(path: Path, *, type_only: bool = False) -> Iterator[str]:
    """Yield every imported module, deferred ones too; those for types only on request."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types and not type_only:
            continue
        yield from _imported(node, path)


def _imported(node: ast.AST, path: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        assert node.level == 0, f"{path}: relative import"
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield full if full in MODULES else node.module


def imports_at_the_top(path: Path) -> Iterator[str]:
    """Yield what is imported as soon as the module is."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        yield from _imported(node, path)


def room(module: str) -> str:
    """Return the room of a module: the folder, or the file at the top, that it is in."""
    return module.split(".")[1] if "." in module else ""


def within(module: str, places: tuple[str, ...]) -> bool:
    """Return whether a module is one of these rooms or modules, or lies in one."""
    inside = module.partition(".")[2]
    return any(inside == place or inside.startswith(f"{place}.") for place in places)


def upward_imports(module: str, path: Path) -> list[str]:
    """Return what a module imports from rooms that come after its own."""
    here = LAYERS.index(room(module))
    found = (i for i in imports_of(path, type_only=True) if i.split(".")[0] == "mlx_ft")
    return [
        imported for imported in found if room(imported) and LAYERS.index(room(imported)) > here
    ]


def test_every_module_is_in_a_room() -> None:
    outside = {room(module) for module in MODULES} - {*LAYERS, "", "__main__"}
    assert not outside


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in LAYERS])
def test_imports_point_down(module: str) -> None:
    assert not upward_imports(module, MODULES[module])


@pytest.mark.parametrize(
    "planted",
    [
        "from mlx_ft.train.stage import train\n",
        "def late() -> None:\n    from mlx_ft import pipeline\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mlx_ft.cli.main\n",
    ],
    ids=["at the top", "deferred", "for types"],
)
def test_an_import_that_points_up_is_found(planted: str, tmp_path: Path) -> None:
    path = tmp_path / "planted.py"
    path.write_text(planted)
    assert len(upward_imports("mlx_ft.data.planted", path)) == 1
    assert not upward_imports("mlx_ft.sweep", path) or "cli" in planted


@pytest.mark.parametrize("module", MODULES)
def test_walls_around_third_parties(module: str) -> None:
    for imported in imports_of(MODULES[module], type_only=True):
        package = imported.split(".")[0]
        assert package not in WALLS or within(module, WALLS[package]), (
            f"{module} imports {imported}"
        )


@pytest.mark.parametrize("module", [name for name in MODULES if not within(name, WITH_MLX)])
def test_mlx_is_imported_at_the_top_only_where_it_computes(module: str) -> None:
    packages = {imported.split(".")[0] for imported in imports_at_the_top(MODULES[module])}
    if module != "mlx_ft.evaluate.lm_eval_model":  # loaded only by lm-evaluation-harness
        assert not packages & {"mlx", "mlx_lm"}


def import_cycle(modules: dict[str, Path]) -> list[str]:
    """Return modules that import each other in a circle, deferred imports included; else none."""
    graph = {
        name: {imported for imported in imports_of(path) if imported in modules} - {name}
        for name, path in modules.items()
    }
    visiting: list[str] = []
    finished: set[str] = set()

    def visit(name: str) -> list[str]:
        if name in visiting:
            return [*visiting[visiting.index(name) :], name]
        if name in finished:
            return []
        visiting.append(name)
        found = next((circle for each in sorted(graph[name]) if (circle := visit(each))), [])
        visiting.pop()
        finished.add(name)
        return found

    return next((circle for name in graph if (circle := visit(name))), [])


def test_no_import_cycles() -> None:
    assert not import_cycle(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_sizes_and_names(module: str) -> None:
    path = MODULES[module]
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_MODULE_LINES, f"{module} has outgrown its room"
    assert len(path.relative_to(PACKAGE).parts) <= MAX_LEVELS, f"{module} is too deep"
    assert path.stem not in FORBIDDEN_NAMES
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{module} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{module}.{node.name} has {lines} lines"


def test_folders_are_small() -> None:
    folders: dict[Path, int] = {}
    for path in MODULES.values():
        folders[path.parent] = folders.get(path.parent, 0) + 1
    assert folders.pop(PACKAGE) <= MAX_FILES_AT_THE_TOP
    assert all(count <= MAX_FILES_IN_A_FOLDER for count in folders.values()), folders


def test_the_face_of_a_room_lists_its_files() -> None:
    """In reading order, as the way in for a newcomer; a file that is gone is not listed."""
    for path in MODULES.values():
        if path.name != "__init__.py" or path.parent == PACKAGE:
            continue
        named = set(re.findall(r"`(\w+)\.py`", path.read_text(encoding="utf-8")))
        there = {each.stem for each in path.parent.glob("*.py")} - {"__init__"}
        assert named == there, path


@pytest.mark.parametrize("module", MODULES)
def test_files_that_prose_names_exist(module: str) -> None:
    path = MODULES[module]
    for name in re.findall(r"`([\w/]+\.py)`", path.read_text(encoding="utf-8")):
        places = (path.parent / name, PACKAGE / name, PACKAGE.parent / name)
        assert any(place.exists() for place in places) or name.startswith("mlx_lm/"), name


@pytest.mark.parametrize("module", MODULES)
def test_silenced_tools_and_broad_excepts_say_why(module: str) -> None:
    for number, line in enumerate(MODULES[module].read_text(encoding="utf-8").splitlines(), 1):
        for marker in ("# type: ignore", "# noqa", "except Exception"):
            if marker in line:
                reason = line.split(marker, 1)[1].partition("#")[2]
                assert reason.strip(), f"{module}:{number}: {marker} without its reason"


def _imported_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def test_what_runs_anywhere_never_imports_mlx() -> None:
    """Not even indirectly: a recipe is checked, and a finished run shown, without loading MLX."""
    away = (*WITH_MLX, "evaluate.lm_eval_model", "__main__")
    names = [name for name in MODULES if not within(name, away)]
    assert len(names) > 100
    # Stage entries and what a parent process needs of those rooms come without MLX too.
    names += ["mlx_ft.train.stage", "mlx_ft.train.supervisor", "mlx_ft.export.stage"]
    loaded = _imported_by("\n".join(f"import {name}" for name in names))
    assert not {module for module in loaded if module == "mlx" or module.startswith("mlx.")}
    assert "mlx_lm" not in loaded
