"""Tokenized rows in, an adapter in mlx-lm's format out, in a process of its own.

Read in this order. In the parent: `stage.py` requests a training, `handoff.py` has the files
between the processes, `supervisor.py` starts, watches and restarts the child. In the child:
`process.py`, `setup.py` (shared by seeds), `session.py` (one training), `loop.py`, `trainer.py`,
`accumulation.py`, with `contract.py`, `plan.py`, `batches.py`, `schedules.py`, `adapters.py`,
`fallbacks.py`;
`selection.py` and `judge.py` choose weights; `checkpoints.py`, `checkpoint_list.py` and
`metrics.py` keep them; `sanity_check.py` runs before anything is merged. `numerics/` is the step.
"""
