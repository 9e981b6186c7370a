"""Killed at any moment, an export leaves nothing that looks finished; run again, it is whole."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ft.runs.folder import read_manifest
from tests.support.exports import base_of, trained_adapter

KILLS = 4
CHILD = """
import sys
from pathlib import Path

import mlx_ft
from mlx_ft.system.console import Console
from mlx_ft.export.build import export_model
from mlx_ft.runs.folder import seal, writing_stage
from mlx_ft.runs.folder import read_manifest
from tests.support.exports import inputs_of

run, base, adapter = (Path(name) for name in sys.argv[1:4])
print("begun", flush=True)
with writing_stage(run, "export") as folder:
    inputs = inputs_of(base, adapter, folder / "models", q_method="gptq")
    seal(folder, "export", "inputs", export_model(inputs, Console()))
print("done", flush=True)
"""


def begun(run: Path, base: Path, adapter: Path) -> subprocess.Popen[str]:
    """Start an export, and return it once its imports are over."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(run), str(base), str(adapter)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ,
    )
    assert child.stdout is not None and child.stdout.readline() == "begun\n"
    return child


@pytest.mark.slow
def test_a_killed_export_is_no_export_and_the_next_one_is(tmp_path: Path) -> None:
    base = base_of("llama", 4, mx.float16, tmp_path)
    adapter = trained_adapter(base, "lora", tmp_path / "adapter")
    run, chance = tmp_path / "run", random.Random(5)
    with begun(tmp_path / "whole", base, adapter) as whole:
        started = time.perf_counter()
        assert whole.wait() == 0
    seconds = time.perf_counter() - started
    for _ in range(KILLS):
        with begun(run, base, adapter) as child:
            time.sleep(chance.uniform(0, 0.8 * seconds))
            child.send_signal(signal.SIGKILL)
        if (run / "export").exists():  # over before it was killed
            assert read_manifest(run / "export") is not None
            shutil.rmtree(run / "export")
            continue
        partial = run / "export.tmp"
        assert not (partial / "manifest.json").exists()
        for folder in (partial / "models").glob("*"):
            if (folder / "config.json").exists():  # a folder's last file: the rest is there
                assert not list(folder.glob("*.part"))
                mx.eval(mx.load(str(folder / "model.safetensors")))
    with begun(run, base, adapter) as again:
        assert again.wait() == 0
    for name in ("fused-f16", "q8"):
        one, other = (
            (place / "export" / "models" / name / "model.safetensors").read_bytes()
            for place in (tmp_path / "whole", run)
        )
        assert one == other
