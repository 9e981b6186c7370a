"""MLX on Linux gets OpenBLAS, other systems are left alone, and nothing of it can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_ft.system import blas
from mlx_ft.system.blas import BlasStatus, preload_openblas
from mlx_ft.system.cache import CACHE_HOME_VARIABLE

linux = pytest.mark.skipif(sys.platform != "linux", reason="OpenBLAS is for MLX's Linux CPU build")
needs_wheel = pytest.mark.skipif(
    not blas._package_folders("ngsolve_openblas"), reason="needs the OpenBLAS wheel"
)

STATUS = (
    "import json\n"
    "import mlx_ft\n"
    "maps = open('/proc/self/maps').read() if mlx_ft.BLAS.fast else ''\n"
    "print(json.dumps([mlx_ft.BLAS.name, mlx_ft.BLAS.fast, mlx_ft.BLAS.detail, maps]))\n"
)


def start(code: str, home: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, CACHE_HOME_VARIABLE: str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def status(process: "subprocess.Popen[str]") -> tuple[BlasStatus, str]:
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    name, fast, detail, maps = json.loads(out)
    return BlasStatus(name, fast, detail), maps


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is looked for, loaded or written: Accelerate and Metal need no help."""
    monkeypatch.setattr(sys, "platform", "darwin")

    def load(*arguments: object, **options: object) -> None:
        pytest.fail("a library was loaded")

    monkeypatch.setattr("mlx_ft.system.blas.ctypes.CDLL", load)
    monkeypatch.setattr(blas, "_wheel_library", load)
    assert preload_openblas() == BlasStatus("platform", True, "Accelerate and Metal")
    assert list(tmp_path.iterdir()) == []


@linux
def test_after_mlx_it_is_too_late_and_said(tmp_path: Path) -> None:
    found, _ = status(start("import mlx.core\n" + STATUS, tmp_path / "home"))
    assert not found.fast
    assert "mlx was imported before mlx_ft" in found.detail
    assert not (tmp_path / "home").exists()


def detail_file(detail: str) -> str:
    return str(Path(detail).resolve())


@linux
@needs_wheel
def test_openblas_serves_mlx_in_a_fresh_process(tmp_path: Path) -> None:
    """It is what `cblas_sgemm` means to every library loaded after it, MLX's among them; it comes
    from links in the cache, beside MLX's own Fortran runtime.
    """
    code = STATUS.replace("import mlx_ft\n", "import mlx_ft\nimport mlx.core\n", 1) + (
        "import ctypes, sys\n"
        "found = ctypes.cast(ctypes.CDLL(None).cblas_sgemm, ctypes.c_void_p).value\n"
        "print(found, file=sys.stderr)\n"
    )
    process = start(code, tmp_path / "home")
    out, address = process.communicate(timeout=60)
    assert process.returncode == 0, address
    name, fast, detail, maps = json.loads(out)
    found = BlasStatus(name, fast, detail)
    assert (found.name, found.fast) == ("OpenBLAS", True)
    assert found.detail.startswith(str(tmp_path / "home" / "blas"))
    mapped = {line.split()[-1] for line in maps.splitlines() if "/" in line}
    assert detail_file(detail) in mapped
    spans = [line.split() for line in maps.splitlines() if line.endswith(detail_file(detail))]
    ends = [[int(end, 16) for end in span[0].split("-")] for span in spans]
    assert any(low <= int(address) < high for low, high in ends), "sgemm is another library's"
    assert any("libgfortran" in name for name in mapped)
    assert any(name.endswith("libmlx.so") for name in mapped)


@linux
@needs_wheel
def test_many_processes_at_once_make_one_set_of_links(tmp_path: Path) -> None:
    processes = [start(STATUS, tmp_path / "home") for _ in range(4)]
    found = [status(process)[0] for process in processes]
    assert {s.name for s in found} == {"OpenBLAS"}
    assert len({s.detail for s in found}) == 1
    links = list(Path(found[0].detail).parent.iterdir())
    assert {link.name for link in links} >= {"libopenblas.so.0", "libgfortran.so.5"}
    assert all(link.is_symlink() and link.exists() for link in links)
    assert not [link for link in links if link.name.split(".")[-1] in map(str, _pids(processes))]


def _pids(processes: "list[subprocess.Popen[str]]") -> list[int]:
    return [process.pid for process in processes]


@linux
@needs_wheel
def test_a_link_that_points_elsewhere_is_put_right(tmp_path: Path) -> None:
    """Another version of the wheel was there before, at the same place."""
    library = blas._wheel_library()
    assert library is not None
    right = library.resolve()
    library.unlink()
    library.symlink_to(tmp_path / "gone")
    again = blas._wheel_library()
    assert again == library and library.resolve() == right


@linux
def test_a_home_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file where the folder should be")
    found, _ = status(start(STATUS, home))
    assert found.fast or "cache folder" in found.detail or "not installed" in found.detail
    assert home.read_text() == "a file where the folder should be"


@linux
@pytest.mark.parametrize("error", [OSError("read-only"), RuntimeError("no home folder")])
def test_whatever_goes_wrong_has_a_sentence_and_no_exception(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def nowhere() -> Path:
        raise error

    def load(*arguments: object, **options: object) -> None:
        raise OSError("libopenblas.so.0: cannot open shared object file")

    monkeypatch.setattr(blas, "cache_home", nowhere)
    monkeypatch.setattr("mlx_ft.system.blas.ctypes.CDLL", load)
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    found = preload_openblas()
    assert (found.name, found.fast) == ("reference BLAS", False)
    assert "cannot open shared object" in found.detail
    if blas._package_folders("ngsolve_openblas"):
        assert str(error) in found.detail


@linux
def test_without_any_openblas_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str, mode: int) -> None:
        loaded.append(name)
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(blas, "_package_folders", lambda name: [])
    monkeypatch.setattr("mlx_ft.system.blas.ctypes.CDLL", load)
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    assert not preload_openblas().fast
    assert loaded == ["libopenblas.so.0"]


@needs_wheel
def test_a_folder_named_mlx_beside_a_script_hides_nothing(tmp_path: Path) -> None:
    """MLX is a package without __init__.py, so that any such folder is part of it."""
    (tmp_path / "mlx").mkdir()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{STATUS}"
    found, _ = status(start(code, tmp_path / "home"))
    assert found.fast, found.detail
