"""The training stage: tokenized rows in, an adapter in mlx-lm's format out.

`loop.py` is the whole run; `batches.py` what is trained when; `forward.py` the split of a model
into frozen prefix, trained top and vocabulary head; `losses.py` the exact loss; `schedules.py`
learning rates; `checkpoints.py` what survives a crash; `look.py` the generations before anything
is merged.
"""
