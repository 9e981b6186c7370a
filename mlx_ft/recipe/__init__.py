"""Everything a user can set, and the one home of every default.

Read in this order: `schema.py` is the root; `data.py`, `preflight.py`, `train.py`, `optimizers.py`,
`export.py`, `evaluation.py` and `gates.py` are its sections, of the types in `fields.py`;
`names.py` has the names of columns, `cli_defaults.py` the defaults that the command line shows.
`load.py` reads a file and --set (`strict_yaml.py`, `keys.py`, `extends.py`, `validate.py`);
`mlx_lm.py` and `mlx_lm_keys.py` read mlx-lm's own form; `write.py` writes a recipe back.
"""
