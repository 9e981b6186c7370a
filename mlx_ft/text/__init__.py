"""Pure functions on strings: numbers with units, sanitizing, repetition, languages.

Read in this order: `quantities.py`, `safe.py`, `markdown.py`, `sparklines.py`, `repetition.py`,
`language.py`, `suggestions.py`, `near_duplicates.py`, `timed_regex.py`, `python_code.py`.
"""
