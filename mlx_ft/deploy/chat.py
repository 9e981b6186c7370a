"""`mlx-ft chat`: answer a person's lines with one of a run's models.

Does not: score answers (`evaluate/`), or serve other programs (`serve.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mlx_ft.evaluate.local_model import open_loaded
from mlx_ft.evaluate.stage import column_source
from mlx_ft.job import Job


def chat_turns(job: Job, column: str, max_tokens: int, lines: Iterable[str]) -> Iterator[str]:
    """Yield the answer of one of the run's models to each line, remembering the conversation.

    An empty line ends it. Raises RunError when the run has no such model yet.
    """
    from mlx_ft.engine.generate import generate
    from mlx_ft.text.safe import printable

    messages: list[dict[str, str]] = []
    with open_loaded(column_source(job, column)) as loaded:
        job.console.say(f"{job.folder.name}, {column}; an empty line ends it")
        for line in lines:
            if not line.strip():
                return
            messages.append({"role": "user", "content": line.rstrip("\n")})
            prompt = loaded.renderer.prompt_ids(messages)
            (answer,) = generate(loaded, [prompt], max_tokens=max_tokens)
            messages.append({"role": "assistant", "content": answer.text})
            yield printable(answer.text)
