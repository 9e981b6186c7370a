"""`mlx-ft doctor`: is this machine, with this MLX, right and fast enough to train?

Read in this order: `examine.py` runs every check; `checks.py` is one check's outcome; `facts.py`
asks the machine; `numerics.py` computes on a `miniature.py`; `speed.py` takes the time of steps.
"""
