"""GGUF writer: a 16-bit model folder as one file for llama.cpp and programs built on it.

Does: write every tensor under llama.cpp's name, in its order of rows and in the requested type, one
tensor at a time; write the model's hyperparameters, tokenizer and chat template.
Does not: change a weight beyond that type's rounding, or leave an unfinished file that looks
finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_ft.errors import Fault, GateFailed, ModelError
from mlx_ft.export.gguf_tokenizer import GgufTokenizer, read_tokenizer
from mlx_ft.model.gguf_support import ModelShape, model_shape
from mlx_ft.model.resolve import read_config
from mlx_ft.recipe.export import GgufKind
from mlx_ft.system.files import replacing

Array = npt.NDArray[Any]

_TYPES = {
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
_FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
# Tensors that lose most with 4 bits, because every token uses them. llama.cpp's own q4_0 files keep
# them wider too.
_EMBEDDINGS = ("token_embd.weight", "output.weight")
_LARGEST_FLOAT16 = 65504.0
# Elements that are quantized at a time; NumPy holds several float32 copies of them.
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file. name: its name in the file. source: its name in the folder."""

    name: str
    source: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType


def write_gguf(model_folder: Path, file: Path, kind: GgufKind) -> int:
    """Write the model of a 16-bit folder to `file` and return its size (bytes).

    The file gets its name once it is complete on the disk. Raises ModelError for a model or a
    tokenizer that llama.cpp does not support, GateFailed for a number that the type cannot hold.
    """
    shape = _shape(model_folder)
    tokenizer = read_tokenizer(model_folder, shape.vocabulary)
    arrays = _lazy_arrays(model_folder)
    tensors = _plan(arrays, shape, kind, model_folder)
    with replacing(file, file.with_name(f"{file.name}.part")) as part:
        writer = gguf.GGUFWriter(part, shape.architecture)
        try:
            _state_model(writer, shape, kind, file.stem)
            _state_tokenizer(writer, tokenizer)
            factors = rope_factors(shape)
            if factors is not None:
                writer.add_tensor_info(
                    "rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes
                )
            for tensor in tensors:
                _announce(writer, tensor)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors)
            for tensor in tensors:
                array = _in_their_order(arrays.pop(tensor.source), tensor.source, shape)
                writer.write_tensor_data(_encode(array, tensor))
                del array
                mx.clear_cache()
        finally:
            writer.close()
    return file.stat().st_size


def _shape(folder: Path) -> ModelShape:
    try:
        return model_shape(read_config(folder))
    except ValueError as error:
        raise ModelError(Fault(str(folder), str(error), "set export.gguf: null")) from error


def _lazy_arrays(folder: Path) -> dict[str, mx.array]:
    """Return the folder's tensors by name, without reading them."""
    arrays: dict[str, mx.array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        arrays.update(loaded)
    return arrays


def _plan(
    arrays: Mapping[str, mx.array], shape: ModelShape, kind: GgufKind, folder: Path
) -> list[_Tensor]:
    """Return the file's tensors in the folder's order. Raises ModelError for an unknown tensor."""
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == shape.architecture)
    names = gguf.get_tensor_name_map(number, shape.layers)
    tensors, faults = [], []
    for source, array in arrays.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        floating = mx.issubdtype(array.dtype, mx.floating)
        if name is None or not floating:
            found = f"{source} ({array.dtype}) has no place in a {shape.architecture} GGUF"
            faults.append(Fault(str(folder), found, "set export.gguf: null"))
            continue
        tensors.append(_Tensor(name, source, array.shape, _type_of(name, array.shape, kind)))
    if faults:
        raise ModelError(faults[:3])
    return tensors


def _type_of(name: str, shape: tuple[int, ...], kind: GgufKind) -> gguf.GGMLQuantizationType:
    """Return a tensor's type: vectors are float32, rows that are not whole blocks float16."""
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    wanted = "q8_0" if kind == "q4_0" and name in _EMBEDDINGS else kind
    block, _ = gguf.GGML_QUANT_SIZES[_TYPES[wanted]]
    return _TYPES[wanted if shape[-1] % block == 0 else "f16"]


def _announce(writer: gguf.GGUFWriter, tensor: _Tensor) -> None:
    """Add a tensor's name, shape and size to the header, which comes before all data."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.type]
    count = int(np.prod(tensor.shape))
    writer.add_tensor_info(
        tensor.name,
        tensor.shape,
        np.dtype(np.float32),  # not looked at: the type is given
        count // block * block_bytes,
        raw_dtype=tensor.type,
    )


def _in_their_order(array: mx.array, source: str, shape: ModelShape) -> mx.array:
    """Return a tensor in llama.cpp's convention, in the type it has (Gemma norms in float32).

    llama.cpp rotates neighbouring rows of a llama's q and k. mlx-lm and Hugging Face rotate row i
    and row i + half a head, so the halves are interleaved. llama.cpp's Gemma norms multiply by the
    weight, the others by the weight plus one.
    """
    if shape.architecture == "llama" and ".self_attn.q_proj." in source:
        return interleave_halves(array, shape.heads)
    if shape.architecture == "llama" and ".self_attn.k_proj." in source:
        return interleave_halves(array, shape.kv_heads)
    if shape.architecture == "gemma3" and source.endswith("norm.weight"):
        return array.astype(mx.float32) + 1
    return array


def interleave_halves(array: mx.array, heads: int) -> mx.array:
    """Return rows (heads x size, ...) with the two halves of every head interleaved."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _encode(array: mx.array, tensor: _Tensor) -> Array:
    """Return a tensor's bytes in its type, computed some rows at a time.

    Raises GateFailed for a number that is not finite or beyond float16 (float32 keeps every one).
    """
    mx.eval(array)
    if tensor.type == gguf.GGMLQuantizationType.F32:
        return np.array(array.astype(mx.float32))
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.type]
    rows, columns = tensor.shape
    encoded = np.empty((rows, columns // block * block_bytes), dtype=np.uint8)
    step = max(1, _CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        chunk = np.array(array[start : start + step].astype(mx.float32))
        largest = max(float(chunk.max()), -float(chunk.min()))
        if not largest <= _LARGEST_FLOAT16:
            found = f"its largest number is {largest:.3g}, float16 ends at 65,504"
            raise GateFailed(Fault(tensor.source, found, "set export.gguf: null"))
        encoded[start : start + step] = gguf.quantize(chunk, tensor.type).view(np.uint8)
    return encoded


def rope_factors(shape: ModelShape) -> npt.NDArray[np.float32] | None:
    """Return the frequency divisors of a Llama 3's RoPE, (head size / 2,); None for other models.

    As mlx_lm/models/rope_utils.py (Llama3RoPE) and "The Llama 3 Herd of Models": long wavelengths
    are divided by `factor`, short ones by 1, those between in proportion.
    """
    scaling = shape.rope_scaling
    if "llama3" not in (scaling.get("type"), scaling.get("rope_type")):
        return None
    factor = float(scaling["factor"])
    low = float(scaling.get("low_freq_factor", 1.0))
    high = float(scaling.get("high_freq_factor", 4.0))
    context = float(scaling.get("original_max_position_embeddings", 8192))
    exponents = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
    turns = context / (2 * np.pi * shape.rope_theta**exponents)  # in the original context
    smooth = (turns - low) / (high - low)
    factors = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(turns > high, 1.0, np.where(turns < low, factor, factors))
    return factors.astype(np.float32)


def _state_model(writer: gguf.GGUFWriter, shape: ModelShape, kind: GgufKind, name: str) -> None:
    """Write the model's hyperparameters (keys: gguf-py, constants.Keys)."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(int(_FILE_TYPES[kind]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    if "linear" in (shape.rope_scaling.get("type"), shape.rope_scaling.get("rope_type")):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(shape.rope_scaling["factor"]))
    if shape.sliding_window is not None:
        writer.add_sliding_window(shape.sliding_window)


def _state_tokenizer(writer: gguf.GGUFWriter, tokenizer: GgufTokenizer) -> None:
    """Write tokens, special ids and templates (keys: gguf-py, constants.Keys.Tokenizer)."""
    special = tokenizer.special
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_token_scores(tokenizer.scores)
    writer.add_token_merges(tokenizer.merges)
    stated = [
        (writer.add_eos_token_id, special.stops[0]),
        (writer.add_eot_token_id, special.stops[1] if len(special.stops) > 1 else None),
        (writer.add_eom_token_id, special.stops[2] if len(special.stops) > 2 else None),
        (writer.add_bos_token_id, special.bos),
        (writer.add_unk_token_id, special.unknown),
        (writer.add_pad_token_id, special.padding),
    ]
    for add, token in stated:
        if token is not None:
            add(token)
    writer.add_add_bos_token(special.add_bos)
    writer.add_add_eos_token(special.add_eos)
    if tokenizer.add_space_prefix is not None:
        writer.add_add_space_prefix(tokenizer.add_space_prefix)
    templates = [{"name": name, "template": text} for name, text in tokenizer.templates.items()]
    writer.add_chat_template(templates)
