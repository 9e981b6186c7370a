"""The run folder: complete stages or none, a record of what happened, and readers of both.

Read in this order: `names.py` has the names of states and stages; `folder.py` writes; `lock.py`
says who works on it; `reader.py`, `metrics.py` and `document.py` read any run, whole or broken;
`state.py`, `listing.py`, `models.py` and `clean.py` use what they read.
"""
