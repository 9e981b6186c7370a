"""The command line: click verbs without logic. `--help` loads neither MLX nor pydantic.

Read in this order: `main.py` (the group, exit codes, error lines), `options.py` (shared by verbs),
`prepare.py`, `run.py`, `runs.py`, `deploy.py` (the verbs).
"""
