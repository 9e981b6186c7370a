"""The evaluation room: the same questions to several models, scored and counted.

`suites.py` reads what is asked; `harness.py` asks it and keeps every answer; `scorers.py` and
`call_parsing.py` judge one answer; `stats.py` turns scores into means with intervals; `tables.py`
prints them.
"""
