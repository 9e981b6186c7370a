"""Metrics for wandb, trackio, tensorboard, mlflow and swanlab, each in a process of its own.

Read in this order: `processes.py` starts and stops them; `follow.py` is the process;
`adapters.py` speaks to each service.
"""
