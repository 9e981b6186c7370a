"""Survival audit: how much of the training is left after rounding, per layer and in the model.

Read in this order: `measures.py` defines gain, noise and survival; `audit.py` measures them;
`verdict.py` writes survival.json, judges and chooses bits; `words.py` formats survival.json.
"""
