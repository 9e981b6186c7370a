"""The house stays livable: rooms apart, walls around third parties, small files, no cycles."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mlx_ft"
LAYERS = (
    "errors text system recipe runs model engine job data evaluate preflight train export "
    "report deploy inputs pipeline rehearse sweep cli"
).split()
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
# Who may import a third-party package: prefixes of module names.
WALLS = {
    "click": ("mlx_ft.cli", "mlx_ft.reference"),
    "pydantic": ("mlx_ft.recipe", "mlx_ft.evaluate.suite"),
    "pydantic_core": ("mlx_ft.recipe", "mlx_ft.evaluate.suite"),
    "yaml": ("mlx_ft.recipe",),
    "jinja2": ("mlx_ft.report", "mlx_ft.model.chat"),
    "matplotlib": ("mlx_ft.report",),
    "transformers": ("mlx_ft.model",),
    "tokenizers": ("mlx_ft.model.builtin",),
    "datasets": ("mlx_ft.data.hub",),
    "pyarrow": ("mlx_ft.data.files",),
    "gguf": ("mlx_ft.export.gguf", "mlx_ft.ollama"),
    "lm_eval": ("mlx_ft.lm_eval",),
    **dict.fromkeys(
        ("trackio", "wandb", "tensorboardX", "mlflow", "swanlab"), ("mlx_ft.trackers",)
    ),
}
# These run anywhere: not even indirectly may they need MLX.
WITHOUT_MLX = ("data", "preflight", "report", "evaluate")
ALSO_WITHOUT_MLX = ("text", "system", "recipe", "runs", "model", "pipeline")
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc", "base"}


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
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def room(module: str) -> str:
    """Return the room of a module: the folder, or the file at the top, that it is in."""
    return module.split(".")[1] if "." in module else ""


def upward_imports(module: str, path: Path) -> list[str]:
    """Return what a module imports from rooms that come after its own."""
    here = LAYERS.index(room(module))
    return [
        imported
        for imported in imports_of(path, type_only=True)
        if imported.split(".")[0] == "mlx_ft"
        and room(imported) in LAYERS
        and LAYERS.index(room(imported)) > here
    ]


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in LAYERS])
def test_imports_point_down(module: str) -> None:
    assert not upward_imports(module, MODULES[module])


@pytest.mark.parametrize("module", MODULES)
def test_walls_around_third_parties(module: str) -> None:
    for imported in imports_of(MODULES[module], type_only=True):
        package = imported.split(".")[0]
        if package in WALLS:
            assert module.startswith(WALLS[package]), f"{module} imports {imported}"


def test_no_import_cycles() -> None:
    graph = {
        name: {
            imported for imported in imports_of(path) if imported in MODULES and imported != name
        }
        for name, path in MODULES.items()
    }
    visiting: list[str] = []
    finished: set[str] = set()

    def visit(name: str) -> None:
        assert name not in visiting, " -> ".join([*visiting[visiting.index(name) :], name])
        if name in finished:
            return
        visiting.append(name)
        for imported in sorted(graph[name]):
            visit(imported)
        visiting.pop()
        finished.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize("module", MODULES)
def test_sizes_and_names(module: str) -> None:
    path = MODULES[module]
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_MODULE_LINES, f"{module} has outgrown its room"
    assert len(path.relative_to(PACKAGE).parts) <= 2, f"{module} is too deep"
    assert path.stem not in FORBIDDEN_NAMES
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip() or path.name == "_version.py", (
        f"{module} has no docstring"
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{module}.{node.name} has {lines} lines"


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
    names = [
        name
        for name in MODULES
        if name.removeprefix("mlx_ft.").startswith(WITHOUT_MLX)
        or name.removeprefix("mlx_ft.").startswith(ALSO_WITHOUT_MLX)
    ]
    assert len(names) > 20
    loaded = _imported_by("\n".join(f"import {name}" for name in names))
    assert not {module for module in loaded if module == "mlx" or module.startswith("mlx.")}
    assert "mlx_lm" not in loaded
