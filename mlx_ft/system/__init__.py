"""The machine and its files: hashing, atomic writes, the console, hardware, signals, arithmetic.

Read in this order: `files.py`, `cache.py`, `console.py`, `hardware.py`, `environment.py`,
`doctor_result.py`, `signals.py`, `blas.py`, `precision.py`, `gpu_errors.py`, `restart.py`,
`awake.py`.
"""
