"""The command line: click verbs that hold no logic. `--help` loads neither MLX nor pydantic.

Read in this order: `main.py` (the group, exit codes, error lines), `options.py` (what verbs share),
`prepare.py`, `run.py`, `runs.py`, `deploy.py` (the verbs).
"""
