"""The export stage: base and adapter in, a 16-bit and a quantized model folder out, both verified.

`fuse.py` does the arithmetic, `folders.py` writes complete model folders, `verify.py` compares each
step with the one before, `stage.py` is the order of it all.
"""
