"""Small pure checks of what is known before training; nothing is changed, nothing is trained.

Read in this order: `stage.py` collects the facts; `checks.py` is the list of checks, with
`rows.py`, `adapter_start.py`, `original.py`, `trainable.py` and `quantization_groups.py`;
`findings.py` has the types in and out; `forecast.py`, `memory.py`, `fit.py` and `known_models.py`
foretell; `base_model.py` judges the base before it is trained.
"""
