"""Tiny real tokenizers, made in the test run, with chat templates."""

import json
from pathlib import Path

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
