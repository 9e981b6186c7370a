"""Base and adapter in, a 16-bit and a quantized model folder out, both verified.

Read in this order: `stage.py` is the entry, `build.py` the order of work; `original.py`, `fuse.py`
and `stored_model.py` read and merge; `quantize.py`, `bit_widths.py`, `gptq.py`, `gptq_math.py` and
`calibration.py` round; `write_weights.py`, `safetensors_writer.py` and `model_folder.py` write;
`layerwise.py`, `layerwise_models.py`, `verify_models.py`, `verify_logits.py` and
`verify_checks.py` verify; `survival/` audits; `card.py`, `gguf.py` and `gguf_tokenizer.py` finish.
"""
