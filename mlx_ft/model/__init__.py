"""A model's name to a folder on disk, and its chat template and shapes; no MLX.

Read in this order: `resolve.py` and `builtin.py` find a model; `chat.py` is the one caller of a
chat template, with `tokenizer_files.py` and `thinking_mode.py`; `shapes.py`,
`safetensors_headers.py`, `adapter_file.py` and `gguf_support.py` read facts, no weights.
"""
