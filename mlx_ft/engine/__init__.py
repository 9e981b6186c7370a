"""A model in memory: load it, attach an adapter, generate. Only `device.py` asks what computes.

Read in this order: `device.py`, `cpu_kernels.py`, `load.py`, `adapters.py`, `decoding.py`,
`generate.py`, `shared_prompts.py`, `likelihood.py`, `partial_model.py`.
"""
