"""Read the artifacts of a run and write them for people: report.html, terminal lines, comparisons.

A report can be made again for an old, unfinished or failed run. Nothing is computed here.

Read in this order: `html.py` and `terminal.py` are the two outputs; `verdict.py`, `evidence.py`,
`checklist.py`, `choice.py`, `tables.py`, `curves.py`, `survival.py`, `samples.py`, `failures.py`
and `differences.py` are their parts; `watch.py`, `live.py` and `runs_table.py` show runs in
progress; `compare/` compares runs; `trackers/` reports to other services.
"""
