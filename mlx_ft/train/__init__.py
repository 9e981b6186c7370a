"""The training stage: tokenized rows in, an adapter in mlx-lm's format out.

`supervisor.py` starts the training process (`child.py`, by files of `handover.py`) and starts it
again when it dies; `stage.py` is what happens in it: load, adapt, train, save, look. `loop.py` is
the run, `run.py` its state and steps, `course.py` what is due when, `choosing.py` which weights are
the best; `batches.py` what is trained when; `steps.py` one exact update; `losses.py` the loss;
`schedules.py` learning rates; `checkpoints.py` what survives a crash. `forward.py` splits a model
into frozen layers, trained top and vocabulary head; `prefix.py`, `prefix_store.py` and
`shared_start.py` keep what the frozen layers give out. `look.py` looks before anything is merged.
"""
