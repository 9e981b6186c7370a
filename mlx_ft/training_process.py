"""The training process with somebody to judge the model. `python -m` runs it.

Does: join the training room's process to what asks and scores. Does not: anything else.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mlx_ft.selection import judge
from mlx_ft.train.child import main

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), judge))
