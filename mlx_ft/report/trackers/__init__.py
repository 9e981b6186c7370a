"""Experiment trackers (wandb, trackio, tensorboard, mlflow, swanlab), each in its own process.

Read in this order: `processes.py` starts and stops them; `follow.py` is the process; `services.py`
speaks to each service.
"""
