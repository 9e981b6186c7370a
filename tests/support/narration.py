"""A console and a progress line that a test can read afterwards."""

import io

from mlx_ft.system.console import Console


class HeardConsole(Console):
    """A console that keeps its lines."""

    def __init__(self) -> None:
        self._heard = io.StringIO()
        super().__init__(self._heard)

    @property
    def lines(self) -> list[str]:
        return self._heard.getvalue().splitlines()


class SeenProgress:
    """Progress that keeps its updates, each as (done, text)."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, str]] = []

    def update(self, done: float, text: str = "") -> None:
        self.seen.append((done, text))
