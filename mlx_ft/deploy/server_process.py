"""The server process: mlx-lm's server with our weights, loaded as in the evaluation.

Run as `python -m mlx_ft.deploy.server_process NAME DATE PARENT [options of mlx_lm.server]`. mlx_ft
is imported before mlx, so that OpenBLAS is loaded on Linux.
Does: load weights, adapter, stop tokens and template as the evaluation does; answer every model
name with this model; end with its parent.
Does not: load the model that a request names, which mlx-lm's server would fetch and run without the
adapter.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlx_lm import server
from mlx_lm.utils import load_tokenizer

from mlx_ft.deploy.serve import READY
from mlx_ft.engine.adapters import attach_adapter
from mlx_ft.engine.cpu_kernels import fast_math
from mlx_ft.engine.load import load_weights
from mlx_ft.errors import MlxFtError
from mlx_ft.model.chat import ChatFormat, ChatRenderer
from mlx_ft.system.signals import interruptible

PARENT_POLL_SECONDS = 1.0


class OnlyModel(server.ModelProvider):  # type: ignore[misc]  # mlx_lm has no type information
    """Provider of the one model that the server was started with, for every model name."""

    def load(self, model_path: str, adapter_path: Any = None, draft_model_path: Any = None) -> Any:
        return super().load("default_model", None, "default_model")


def load_as_measured(folder: Path, adapter: Path | None, date: str, lasting: ExitStack) -> Any:
    """Return (model, tokenizer, config) as mlx-lm's server takes them. Raises ModelError.

    lasting: keeps the fast kernels in use until it is closed.
    """
    renderer = ChatRenderer.from_folder(folder, ChatFormat(date=date))
    model, config, _ = load_weights(folder)
    if adapter is not None:
        attach_adapter(model, adapter)
    lasting.enter_context(fast_math(model))
    pinned = renderer.pinned_template()
    changed = {} if pinned == renderer.tokenizer.chat_template else {"chat_template": pinned}
    tokenizer = load_tokenizer(folder, changed, eos_token_ids=sorted(renderer.stop_ids))
    return model, tokenizer, config


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


def _list_only(name: str) -> Callable[[Any], None]:
    """Return a handler that lists one model, instead of all models in the Hub's cache."""

    def handle(request: Any) -> None:
        entry = {"id": name, "object": "model", "created": request.created}
        request._set_completion_headers(200)
        request.end_headers()
        request.wfile.write(json.dumps({"object": "list", "data": [entry]}).encode())

    return handle


def main(name: str, date: str, parent: int) -> None:
    """Serve until SIGTERM or Ctrl-C, or until process `parent` ends; options are in sys.argv."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with ExitStack() as lasting:

        def load(path: str, adapter_path: str | None = None, **_: Any) -> Any:
            try:
                adapter = None if adapter_path is None else Path(adapter_path)
                loaded = load_as_measured(Path(path), adapter, date, lasting)
            except Exception as error:  # in the server's thread, which would die and leave it up
                words = str(error) if isinstance(error, MlxFtError) else traceback.format_exc()
                print(words, file=sys.stderr, flush=True)
                os._exit(1)
            print(READY, flush=True)
            return loaded

        server.load, server.ModelProvider = load, OnlyModel
        server.APIHandler.handle_models_request = _list_only(name)
        with interruptible():
            server.main()


if __name__ == "__main__":
    given_name, given_date, given_parent = sys.argv[1:4]
    del sys.argv[1:4]
    main(given_name, given_date, int(given_parent))
