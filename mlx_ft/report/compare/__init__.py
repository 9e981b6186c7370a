"""`mlx-ft compare`: `document.py` holds the runs against each other, `tables.py` and `formats.py`
write the result in the formats that `names.py` names.
"""
