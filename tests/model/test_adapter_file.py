"""A file of adapter weights is looked at before anything is loaded, and refused in one line."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_ft.errors import ModelError
from mlx_ft.model.adapter_file import start_sha256, start_shapes


def weights_file(path: Path, value: float = 0.0) -> Path:
    save_file({"layers.0.lora_a": np.full((4, 2), value), "b": np.zeros(3)}, path)
    return path


def test_shapes_and_content_are_those_of_the_file(tmp_path: Path) -> None:
    one, other = weights_file(tmp_path / "one"), weights_file(tmp_path / "other", 1.0)
    one.with_name("same").write_bytes(one.read_bytes())
    assert start_shapes(str(one)) == {"layers.0.lora_a": (4, 2), "b": (3,)}
    assert start_sha256(None) is None
    hashes = [start_sha256(str(tmp_path / name)) for name in ("one", "other", "same")]
    assert hashes[0] == hashes[2] != hashes[1] and start_shapes(str(other)) == start_shapes(
        str(one)
    )


def test_what_is_no_file_of_weights_is_said_in_one_line(tmp_path: Path) -> None:
    whole = weights_file(tmp_path / "whole").read_bytes()
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "torn").write_bytes(whole[:-1])
    (tmp_path / "list").write_bytes((2).to_bytes(8, "little") + b"[]")
    (tmp_path / "odd").write_bytes((9).to_bytes(8, "little") + b'{"a":{} }')
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    said = {
        "folder": "is a folder - name the file in it",
        "nothing": "not found - check the path",
        **dict.fromkeys(("empty", "other.npz", "list", "odd"), "safetensors header"),
        "torn": "the file is cut off",
    }
    for name, words in said.items():
        for look in (start_sha256, start_shapes):
            with pytest.raises(ModelError, match=words) as caught:
                look(str(tmp_path / name))
            assert f"train.resume_adapter_file: {tmp_path / name}: " in str(caught.value)
            assert len(caught.value.faults) == 1
