"""What stands in a GGUF is the model: every tensor, number, token, merge and template."""

import json
import math
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlx_ft.errors import GateFailed, ModelError
from mlx_ft.export.gguf import rope_factors, write_gguf
from mlx_ft.model.chat import ChatFormat, ChatRenderer
from mlx_ft.model.gguf_support import model_shape
from tests.support.gguf_models import CONFIGS, LLAMA3, PATCHED, patch_tokenizer
from tests.support.models import TINY_CONFIGS, stored_arrays, write_random_weights, write_tiny_model
from tests.support.tokenizers import (
    CHATML_TEMPLATE,
    SENTENCEPIECE_TOKENS,
    write_tiny_sentencepiece,
    write_tiny_tokenizer,
)

F16, F32 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32
Q4_0, Q8_0 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
# llama.cpp's names, written out (docs: gguf.md, "Standardized tensor names").
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def field(reader: gguf.GGUFReader, key: str) -> Any:
    found = reader.get_field(key)
    return None if found is None else found.contents()


def gguf_name(source: str, model_type: str) -> str:
    module, _, kind = source.rpartition(".")
    names = NAMES | (GEMMA_NAMES if model_type == "gemma3_text" else {})
    if not module.startswith("model.layers."):
        return f"{names[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{names[part]}.{kind}"


def in_llama_cpp_order(values: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: what stands at pair p, half s of a head comes from half s, row p."""
    size = len(values) // heads
    order = [
        head * size + half * (size // 2) + pair
        for head in range(heads)
        for pair in range(size // 2)
        for half in range(2)
    ]
    return values[order]


def expected_tensors(folder: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    expected = {}
    for source, array in stored_arrays(folder / "model.safetensors").items():
        values = np.array(array.astype(mx.float32))
        if config["model_type"] in ("llama", "mistral"):
            if "q_proj" in source:
                values = in_llama_cpp_order(values, config["num_attention_heads"])
            if "k_proj" in source:
                values = in_llama_cpp_order(values, config["num_key_value_heads"])
        if config["model_type"] == "gemma3_text" and "norm" in source:
            values = values + 1
        expected[gguf_name(source, config["model_type"])] = values
    return expected


def largest_error(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return per element how far a block of 32 may be rounded: half a step of q8_0, a step of q4_0
    (its 16 steps reach from -8 to 7), and the scale's own rounding to 11 bits.
    """
    blocks = values.reshape(-1, 32)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    step = {Q8_0: 0.5 / 127, Q4_0: 1 / 8}[kind]
    return np.broadcast_to(largest * (step + 2**-10), blocks.shape).reshape(values.shape)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_tensor_is_the_models(tmp_path: Path, name: str, kind: Any) -> None:
    config = CONFIGS[name]
    folder = write_random_weights(tmp_path / "model", config)
    file = tmp_path / "tiny.gguf"
    assert write_gguf(folder, file, kind) == file.stat().st_size
    assert [path.name for path in tmp_path.glob("tiny*")] == ["tiny.gguf"]

    expected = expected_tensors(folder, config)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    factors = read.pop("rope_freqs.weight", None)
    assert (factors is not None) == (name == "llama3")
    assert read.keys() == expected.keys()
    for tensor_name, values in expected.items():
        tensor = read[tensor_name]
        assert tuple(reversed(tensor.shape.tolist())) == values.shape
        found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
        if tensor.tensor_type in (F16, F32):
            assert np.array_equal(found, values), tensor_name
        else:
            assert (np.abs(found - values) <= largest_error(values, tensor.tensor_type)).all()
        wide = kind == "q4_0" and tensor_name in ("token_embd.weight", "output.weight")
        wanted = {"f16": F16, "q8_0": Q8_0, "q4_0": Q8_0 if wide else Q4_0}[kind]
        if values.ndim == 1:
            wanted = F32
        elif values.shape[-1] % 32:
            wanted = F16
        assert tensor.tensor_type == wanted, tensor_name


def test_numbers_of_the_model(tmp_path: Path) -> None:
    folder = write_random_weights(tmp_path / "model", TINY_CONFIGS["mistral"])
    write_gguf(folder, tmp_path / "tiny.gguf", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert field(reader, "general.architecture") == "llama"
    assert field(reader, "general.name") == "tiny"
    assert field(reader, "general.file_type") == 7
    stated = {
        "block_count": 2,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "context_length": 512,
        "vocab_size": 320,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.dimension_count": 32,
        "rope.freq_base": 1e6,
    }
    assert {key: field(reader, f"llama.{key}") for key in stated} == stated
    epsilon = field(reader, "llama.attention.layer_norm_rms_epsilon")
    assert math.isclose(epsilon, 1e-5, rel_tol=1e-6)
    assert field(reader, "llama.rope.scaling.type") is None


def test_scaled_angles_and_windows(tmp_path: Path) -> None:
    folder = write_random_weights(tmp_path / "gemma", CONFIGS["gemma linear"])
    write_gguf(folder, tmp_path / "gemma.gguf", "f16")
    reader = gguf.GGUFReader(tmp_path / "gemma.gguf")
    assert field(reader, "gemma3.rope.scaling.type") == "linear"
    assert field(reader, "gemma3.rope.scaling.factor") == 4.0
    assert field(reader, "gemma3.attention.sliding_window") == 8


def test_llama_3_turns_as_in_mlx_lm() -> None:
    from mlx_lm.models.rope_utils import Llama3RoPE

    config = TINY_CONFIGS["llama"] | {"head_dim": 64, "rope_scaling": LLAMA3}
    factors = rope_factors(model_shape(config))
    assert factors is not None
    scaled = np.array(Llama3RoPE(64, base=10000.0, scaling_config=LLAMA3)._freqs)
    plain = 10000.0 ** (np.arange(0, 64, 2) / 64)
    assert np.allclose(plain * factors, scaled, rtol=1e-5)
    assert factors.min() == 1.0 and factors.max() == 8.0 and len(np.unique(factors)) > 3
    assert rope_factors(model_shape(TINY_CONFIGS["llama"])) is None


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "pre"),
    [
        ([], False, "gpt-2"),
        (["digits"], False, "smollm"),
        ([r"\p{N}"], False, "qwen2"),
        ([r"\p{N}{1,3}"], True, "llama-bpe"),
    ],
)
def test_byte_level_tokens_and_merges(
    tmp_path: Path, steps: list[str], ignore_merges: bool, pre: str
) -> None:
    folder = write_random_weights(tmp_path / "model", PATCHED)
    described = patch_tokenizer(folder, steps, ignore_merges)
    write_gguf(folder, tmp_path / "tiny.gguf", "f16")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert field(reader, "tokenizer.ggml.model") == "gpt2"
    assert field(reader, "tokenizer.ggml.pre") == pre
    vocabulary = described["model"]["vocab"]
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == 325 == len(set(tokens))
    assert {token: tokens.index(token) for token in vocabulary} == vocabulary
    merges = [" ".join(pair) for pair in described["model"]["merges"]]
    assert field(reader, "tokenizer.ggml.merges") == merges
    types = field(reader, "tokenizer.ggml.token_type")
    unused = 325 - len(vocabulary)
    assert unused == 2
    assert types == [3] * 3 + [1] * (len(vocabulary) - 3) + [5] * unused
    assert field(reader, "tokenizer.ggml.scores") is None
    assert field(reader, "tokenizer.ggml.add_bos_token") is False


@pytest.mark.parametrize(
    ("kind", "prefix"), [("gemma", False), ("llama", True), ("mistral", False)]
)
def test_sentencepiece_tokens_and_scores(tmp_path: Path, kind: str, prefix: bool) -> None:
    folder = write_tiny_sentencepiece(tmp_path / "model", kind)
    config = TINY_CONFIGS["llama"] | {"vocab_size": SENTENCEPIECE_TOKENS}
    write_random_weights(folder, config)
    write_gguf(folder, tmp_path / "tiny.gguf", "f16")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert field(reader, "tokenizer.ggml.model") == "llama"
    assert field(reader, "tokenizer.ggml.add_space_prefix") is prefix
    assert field(reader, "tokenizer.ggml.add_bos_token") is True
    assert field(reader, "tokenizer.ggml.merges") is None
    tokens = field(reader, "tokenizer.ggml.tokens")
    scores = field(reader, "tokenizer.ggml.scores")
    types = field(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(scores) == len(types) == SENTENCEPIECE_TOKENS
    assert types[:5] == [2, 3, 3, 3, 3] and set(types[5:261]) == {6}
    described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    order = list(dict.fromkeys("".join(pair) for pair in described["model"]["merges"]))
    assert len(order) > 40
    by_score = sorted(order, key=lambda token: -scores[tokens.index(token)])
    assert by_score == order
    assert max(s for t, s in zip(tokens, scores, strict=True) if t not in order) < min(
        scores[tokens.index(token)] for token in order
    )
    assert field(reader, "tokenizer.ggml.eos_token_id") == 2
    assert field(reader, "tokenizer.ggml.eot_token_id") == 4
    assert field(reader, "tokenizer.ggml.bos_token_id") == 1
    assert field(reader, "tokenizer.ggml.unknown_token_id") == 0


def test_every_stop_id_and_special_token_is_stated(tmp_path: Path) -> None:
    folder = write_random_weights(tmp_path / "model", TINY_CONFIGS["llama"])
    text = json.dumps({"eos_token_id": [1, 0, 2]})
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    write_gguf(folder, tmp_path / "tiny.gguf", "f16")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    stated = [field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    renderer = ChatRenderer.from_folder(folder, ChatFormat(date="2000-01-01"))
    assert stated == [2, 0, 1] and set(stated) == renderer.stop_ids
    assert field(reader, "tokenizer.ggml.bos_token_id") == 0
    assert field(reader, "tokenizer.ggml.padding_token_id") == 0


def test_the_template_is_kept_byte_for_byte(tmp_path: Path) -> None:
    folder = write_random_weights(tmp_path / "model", TINY_CONFIGS["llama"])
    write_gguf(folder, tmp_path / "tiny.gguf", "f16")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert field(reader, "tokenizer.chat_template") == CHATML_TEMPLATE

    template = "{# Zwölf 🦊 #}\n\n" + CHATML_TEMPLATE + "{{ '\\t' }}  \n"
    (folder / "chat_template.jinja").write_bytes(template.encode())
    write_gguf(folder, tmp_path / "other.gguf", "f16")
    found = gguf.GGUFReader(tmp_path / "other.gguf").get_field("tokenizer.chat_template")
    assert found is not None and found.parts[-1].tobytes() == template.encode()


def test_templates_by_name_are_all_there(tmp_path: Path) -> None:
    folder = write_random_weights(tmp_path / "model", TINY_CONFIGS["llama"])
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["chat_template"] = [
        {"name": "default", "template": CHATML_TEMPLATE},
        {"name": "tool_use", "template": "tools " + CHATML_TEMPLATE},
    ]
    path.write_text(json.dumps(config), encoding="utf-8")
    write_gguf(folder, tmp_path / "tiny.gguf", "f16")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert field(reader, "tokenizer.chat_template") == CHATML_TEMPLATE
    assert field(reader, "tokenizer.chat_template.tool_use") == "tools " + CHATML_TEMPLATE


def test_shards_are_read_as_one_model(tmp_path: Path) -> None:
    folder = write_random_weights(tmp_path / "model", TINY_CONFIGS["qwen2"])
    write_gguf(folder, tmp_path / "whole.gguf", "q8_0")
    weights = stored_arrays(folder / "model.safetensors")
    mx.eval(weights)
    names = sorted(weights)
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = folder / f"model-{number:05d}-of-00002.safetensors"
        mx.save_safetensors(str(file), {name: weights[name] for name in part})
    (folder / "model.safetensors").unlink()
    write_gguf(folder, tmp_path / "parts.gguf", "q8_0")
    one, other = (
        {t.name: t.data.tobytes() for t in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("whole.gguf", "parts.gguf")
    )
    assert one == other


def test_bfloat16_is_written_exactly(tmp_path: Path) -> None:
    folder = write_random_weights(tmp_path / "model", TINY_CONFIGS["llama"])
    weights = stored_arrays(folder / "model.safetensors")
    weights = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    write_gguf(folder, tmp_path / "tiny.gguf", "f16")
    expected = expected_tensors(folder, TINY_CONFIGS["llama"])
    for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors:
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        # bfloat16 reaches below float16's smallest normal number, where float16 has fewer bits.
        normal = np.abs(expected[tensor.name]) >= 2**-14
        assert np.array_equal(found[normal], expected[tensor.name][normal])


def spoil(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(described[key], dict):
            described[key] |= value
        else:
            described[key] = value
    path.write_text(json.dumps(described), encoding="utf-8")


UNKNOWN_SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": r"\p{L}+|\p{N}"},
            "behavior": "Isolated",
            "invert": False,
        },
        {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
    ],
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pre_tokenizer": UNKNOWN_SPLIT}, "unknown pre-tokenizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "unknown normalizer and pre-tokenizer"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"model": {"ignore_merges": True}}, "ignore_merges is true"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    folder = write_random_weights(tmp_path / "model", TINY_CONFIGS["llama"])
    spoil(folder, change)
    with pytest.raises(ModelError, match=reason):
        write_gguf(folder, tmp_path / "tiny.gguf", "f16")
    assert not list(tmp_path.glob("tiny*"))


def test_what_a_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    folder = write_random_weights(tmp_path / "model", TINY_CONFIGS["llama"])
    path = folder / "tokenizer.json"
    kept = path.read_text(encoding="utf-8")
    described = json.loads(kept)
    described["added_tokens"][1]["rstrip"] = True
    path.write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(ModelError, match="takes spaces"):
        write_gguf(folder, tmp_path / "tiny.gguf", "f16")
    path.write_text(kept, encoding="utf-8")
    text = json.dumps({"eos_token_id": [0, 1, 2, 3]})
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match="room for three"):
        write_gguf(folder, tmp_path / "tiny.gguf", "f16")


def test_a_quantized_folder_and_a_foreign_tensor_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "small", "llama", bits=4)
    with pytest.raises(ModelError, match="has no place"):
        write_gguf(folder, tmp_path / "tiny.gguf", "f16")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "granite"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="granite"):
        write_gguf(folder, tmp_path / "tiny.gguf", "f16")


def test_a_vocabulary_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    config = TINY_CONFIGS["llama"] | {"vocab_size": 200}
    folder = write_random_weights(tmp_path / "model", config)
    with pytest.raises(ModelError, match="200 rows"):
        write_gguf(folder, tmp_path / "tiny.gguf", "f16")


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 1e6])
def test_a_number_that_does_not_fit_leaves_no_file(tmp_path: Path, number: float) -> None:
    folder = write_random_weights(tmp_path / "model", TINY_CONFIGS["llama"])
    weights = stored_arrays(folder / "model.safetensors")
    last = list(weights)[-1]
    assert weights[last].ndim == 2
    weights[last] = weights[last].astype(mx.bfloat16)
    weights[last][3, 5] = mx.array(number)
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(GateFailed, match=last):
        write_gguf(folder, tmp_path / "tiny.gguf", "q8_0")
    assert not list(tmp_path.glob("tiny*"))


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    folder = write_random_weights(tmp_path / "model", TINY_CONFIGS["llama"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(OSError):
            write_gguf(folder, tmp_path / "tiny.gguf", "f16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("tiny*"))
    write_gguf(folder, tmp_path / "tiny.gguf", "f16")
    assert [path.name for path in tmp_path.glob("tiny*")] == ["tiny.gguf"]


def test_a_killed_export_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    """The kernel kills the writer at its 60,000th byte, and the next export is not disturbed."""
    folder = write_random_weights(tmp_path / "model", TINY_CONFIGS["llama"])
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from mlx_ft.export.gguf import write_gguf\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), 'f16')\n"
    )
    file = tmp_path / "tiny.gguf"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(file)], check=False, timeout=120
    )
    assert done.returncode == -signal.SIGXFSZ
    assert not file.exists() and (tmp_path / "tiny.gguf.part").stat().st_size == 60_000
    assert write_gguf(folder, file, "f16") == file.stat().st_size > 60_000
    assert len(gguf.GGUFReader(file).tensors) == 20
    assert not (tmp_path / "tiny.gguf.part").exists()


@pytest.mark.model
def test_the_built_in_tokenizer_is_recognised(tmp_path: Path, builtin_model: Path) -> None:
    from mlx_ft.export.gguf_tokenizer import read_tokenizer

    tokenizer = read_tokenizer(builtin_model, 49152)
    assert (tokenizer.model, tokenizer.pre) == ("gpt2", "smollm")
    assert len(tokenizer.tokens) == 49152 and tokenizer.types.count(5) == 0
    assert tokenizer.tokens[tokenizer.special.stops[0]] == "<|im_end|>"
    assert not tokenizer.special.add_bos
    write_tiny_tokenizer(tmp_path)
    assert read_tokenizer(tmp_path, 320).pre == "gpt-2"
