"""Judge one answer. A scorer's rule, keys and target stand together in one file.

Read in this order: `protocol.py` says what a scorer is; `text.py`, `structured.py`,
`instructions.py` and `tool_calls.py` are the scorers; `score.py` adds what holds for all of them,
any_of and all_of; `registry.py` is the closed list. `json_schema.py`, `call_parsing.py` and
`tool_formats.py` serve them; `keys.py` has types of keys that they share.
"""
