"""`mlx-ft compare`: runs side by side.

Read in this order: `document.py` compares the runs; `tables.py` lays the comparison out;
`formats.py` writes it in the formats of `names.py`.
"""
