"""The evaluation room: the same questions to several models, scored and counted.

`suites.py` reads what is asked (`suite_keys.py` has the keys); `harness.py` asks it and keeps every
answer in `sample_log.py`'s files, after `fingerprint.py` has compared the chat format with the
trained one; `scorers.py` and `call_parsing.py` judge one answer; `stats.py` turns scores into means
with intervals.
"""
