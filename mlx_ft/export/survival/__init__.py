"""How much of the training is left after rounding, per layer and in the model's answers.

Read in this order: `measures.py` defines gain, noise and survival; `audit.py` measures them;
`verdict.py` writes survival.json, judges and chooses bits; `words.py` puts it in words.
"""
