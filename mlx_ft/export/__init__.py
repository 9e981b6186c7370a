"""Export: base and adapter in, a verified 16-bit and a verified quantized model folder out.

Read in this order: `stage.py` is the entry, `build.py` the order of work. `original.py`, `fuse.py`
and `stored_model.py` read and fuse. `quantize.py`, `bit_widths.py`, `gptq.py`, `gptq_math.py` and
`calibration.py` quantize. `write_weights.py`, `safetensors_writer.py` and `model_folder.py` write.
`layerwise.py`, `layerwise_models.py`, `verify_models.py`, `verify_logits.py` and
`verify_checks.py` verify. `survival/` audits. `card.py` describes; `gguf.py` and
`gguf_tokenizer.py` write GGUF.
"""
