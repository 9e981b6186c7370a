"""`python -m mlx_ft` is `mlx-ft`."""

from mlx_ft.cli.main import main

if __name__ == "__main__":
    main()
