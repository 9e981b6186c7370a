"""Judge one answer. A scorer's target, keys and rule stand together in one file.

Read in this order: `protocol.py` says what a scorer is, `keys.py` what its keys offer; `text.py`,
`structured.py`, `instructions.py`, `tool_calls.py` and `combined.py` are the scorers;
`registry.py` is the closed list, and says how a new scorer is added; `score.py` scores one answer,
with the checks around every rule. `json_schema.py`, `json_formats.py`, `call_parsing.py` and
`tool_formats.py` serve the scorers.
"""
