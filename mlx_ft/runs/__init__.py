"""The run folder: complete stages or none, a record of each run, and readers of both.

Read in this order: `names.py` has the names of states and stages; `folder.py` writes; `lock.py`
tells who is working on it; `reader.py`, `metrics.py` and `document.py` read any run, whole or
broken; `state.py`, `listing.py`, `models.py` and `clean.py` build on them.
"""
