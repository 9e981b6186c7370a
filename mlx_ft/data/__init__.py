"""Rows in, token ids out: read, check, render, count, write.

Read in this order: `stage.py` is the entry; `sources.py`, `hub.py` and `files.py` read; `rows.py`,
`messages.py`, `field_mapping.py` and `problems.py` understand and refuse; `lint.py`, `tool_api.py`,
`tool_calls.py` and `contamination.py` warn; `replay.py` adds rows; `render.py`, `loss_weights.py`,
`order.py`, `tokens.py` and `statistics.py` are what `prepare.py` does in order; `show.py` shows.
"""
