"""A tiny real tokenizer, made in the test run: byte-level BPE, ChatML markers, a chat template.

With a model, rows, a suite and a recipe to it.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_ft.inputs import OpenRun
    from mlx_ft.job import Job

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{% for call in message.get('tool_calls') or [] %}"
    "{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "what is the capital of France? the capital of France is Paris.",
    "user and assistant talk about files, tests and tools",
    'execute_code("""read_file(path="src/main.py")""")',
    "hello, how are you today? I am fine, thank you.",
)


def write_tiny_tokenizer(folder: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json into `folder` (made if needed); return it.

    320 tokens at most, ids 0 to 2 are the special tokens; `<|im_end|>` ends a turn. Deterministic.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHATML_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


# Step by step as the tokenizers of SentencePiece models have it: where they put spaces.
SENTENCEPIECE_STEPS = {
    "gemma": (
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
    ),
    "llama": (
        {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        None,
    ),
    "mistral": (
        None,
        {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "first",
            "split": False,
        },
    ),
}
SENTENCEPIECE_TOKENS = 512


def write_tiny_sentencepiece(folder: Path, kind: str) -> Path:
    """Write a BPE tokenizer as it is made from a SentencePiece model, of a `kind` of the above.

    Ids: unknown, <s>, </s>, two turn markers, 256 bytes, pieces by rank, single characters; as in
    the originals there is a merge for every way to make a piece of two. A BOS begins plain text.
    """
    from tokenizers import Tokenizer, models, trainers

    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    texts = [sentence.replace(" ", "\u2581") for sentence in SENTENCES]
    trained.train_from_iterator([*texts, "\u2581" + "\u2581".join(texts)], trainer)
    learnt = json.loads(trained.to_str())["model"]
    special = ["<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"]
    joined = dict.fromkeys("".join(pair) for pair in learnt["merges"])
    letters = [piece for piece in learnt["vocab"] if piece not in joined]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *joined, *letters]
    known = {*joined, *letters}
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in joined
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    normalizer, pre_tokenizer = SENTENCEPIECE_STEPS[kind]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, "special": True, "normalized": False}
            | {"single_word": False, "lstrip": False, "rstrip": False}
            for index, token in enumerate(special)
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": merges,
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{{ bos_token }}{% for message in messages %}<start_of_turn>"
        "{{ message['role'] }}\n{{ message['content'] }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    generation = {"eos_token_id": [2, 4]}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 320,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    },
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "vocab_size": 320,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
    },
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": 320,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    },
    "mistral": {
        "model_type": "mistral",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "vocab_size": 320,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
    },
    "gemma2": {
        "model_type": "gemma2",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "rms_norm_eps": 1e-6,
        "vocab_size": 320,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "hidden_size": 64,
        "num_hidden_layers": 7,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "rms_norm_eps": 1e-6,
        "vocab_size": 320,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 8,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 512,
    },
}


def random_model(config: dict[str, Any], seed: int = 0) -> "nn.Module":
    """Return mlx-lm's model of this config, with the weights that a seed gives it."""
    import mlx.core as mx
    from mlx_lm.utils import _get_classes

    model_class, arguments_class = _get_classes(config)
    mx.random.seed(seed)
    model: nn.Module = model_class(arguments_class.from_dict(config))
    return model


def write_model_files(folder: Path, config: dict[str, Any], weights: dict[str, "mx.array"]) -> Path:
    """Write config.json and model.safetensors into `folder`; return it."""
    import mlx.core as mx

    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_random_model(
    folder: Path,
    config: dict[str, Any],
    *,
    bits: int | None = None,
    group_size: int = 32,
    seed: int = 0,
) -> Path:
    """Write a random model of this config with the tiny tokenizer, quantized if `bits` is given."""
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    write_tiny_tokenizer(folder)
    model = random_model(config, seed)
    if bits is not None:
        nn.quantize(model, group_size=group_size, bits=bits)
        config = config | {"quantization": {"group_size": group_size, "bits": bits}}
    return write_model_files(folder, config, dict(tree_flatten(model.parameters())))


def write_stored(
    folder: Path, kind: str, dtype: "mx.Dtype", bits: int | None = None, layers: int = 3
) -> Path:
    """Write a random model into a new folder with its weights, or their scales, in this type."""
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    folder.mkdir()
    write_tiny_tokenizer(folder)
    config: dict[str, Any] = TINY_CONFIGS[kind] | {"num_hidden_layers": layers}
    model = random_model(config)
    if kind == "gemma3_text":
        model.pop("lm_head")  # as its sanitize does for a folder without one
    model.set_dtype(dtype)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
        config |= {"quantization": {"group_size": 32, "bits": bits}}
    return write_model_files(folder, config, dict(tree_flatten(model.parameters())))


def write_tiny_model(
    folder: Path, model_type: str = "llama", *, bits: int | None = 4, layers: int = 2, seed: int = 0
) -> Path:
    """Write a complete random model folder, quantized in groups of 32 unless `bits` is None."""
    config = TINY_CONFIGS[model_type] | {"num_hidden_layers": layers}
    return write_random_model(folder, config, bits=bits, seed=seed)


def write_random_weights(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Write a float16 model of this config with the tokenizer that `folder` has (or the tiny one).

    Every tensor is random, norms and biases too, and large enough that each one matters.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    if not (folder / "tokenizer.json").exists():
        write_tiny_tokenizer(folder)
    model = random_model(config)
    if config["model_type"] == "gemma3_text":
        model.pop("lm_head")  # as its sanitize does for a folder without one
    mx.random.seed(seed)
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        noise = mx.random.normal(array.shape)
        if name.endswith("norm.weight"):
            centre = 0.0 if config["model_type"] == "gemma3_text" else 1.0
            array = centre + 0.3 * noise
        elif array.ndim == 1:
            array = noise
        elif "embed_tokens" in name:  # a tied head then spreads its guesses over several tokens
            array = 0.25 * noise
        else:
            array = 1.5 * noise / array.shape[-1] ** 0.5
        weights[name] = array.astype(mx.float16)
    return write_model_files(folder, config, weights)


def write_rows(folder: Path, train: int = 24, valid: int = 6) -> Path:
    """Write train.jsonl and valid.jsonl with chat rows of mixed length into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    words = "quick brown fox jumps over lazy dog files tests tools Paris France hello".split()
    for name, count, offset in (("train", train, 0), ("valid", valid, 1000)):
        lines = []
        for index in range(offset, offset + count):
            question = " ".join(words[(index * 7 + k) % len(words)] for k in range(2 + index % 9))
            answer = " ".join(words[(index * 5 + k) % len(words)] for k in range(1 + index % 5))
            messages = [
                {"role": "user", "content": f"{question} {index}"},
                {"role": "assistant", "content": answer},
            ]
            lines.append(json.dumps({"messages": messages, "category": words[index % 3]}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


RECIPE = """
name: tiny
model: ./model
data: {path: data}
preflight: {accept: {base_health: a random model}}
train:
  num_layers: 2
  epochs: 40
  learning_rate: 3e-3
  lora_parameters: {rank: 16}
  steps_per_report: 60
  steps_per_eval: 120
export: {q_group_size: 32}
eval: {suites: [suite.yaml]}
"""
SUITE = """
name: small
description: Whether the tiny model says anything.
samples: suite.jsonl
scorer: {name: talk, forbid: [execute_code]}
max_tokens: 12
enable_thinking: false
"""


def write_place(folder: Path) -> None:
    """Write a model, rows, a suite and a recipe into `folder`."""
    write_tiny_model(folder / "model")
    write_rows(folder / "data")
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "suite.yaml").write_text(SUITE)
    samples = [
        {
            "id": f"s{number}",
            "category": "talk",
            "messages": [{"role": "user", "content": f"quick brown {number}"}],
            "target": {"any_of": []},
        }
        for number in range(3)
    ]
    (folder / "suite.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))


def job_of(place: Path, *sets: str) -> "Job":
    """Return the job of the recipe in `place`, whose runs are kept there too."""
    return open_run_of(place, *sets).job


def open_run_of(place: Path, *sets: str) -> "OpenRun":
    """Return the run of the recipe in `place`, opened, with what its stages are given."""
    from mlx_ft.inputs import open_run
    from mlx_ft.recipe.load import load_recipe
    from mlx_ft.system.console import Console

    return open_run(load_recipe(place / "r.yaml", sets), place / "runs", Console())
