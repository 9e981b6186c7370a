"""`mlx-ft install --ollama`: put a run's GGUF into Ollama, with its chat template.

Does: write a Modelfile beside the GGUF, run `ollama create` where Ollama is installed, check one
answer. Does not: write the GGUF (`export/gguf.py`), or translate the template
(`ollama_template.py`).
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from gguf import GGUFReader

from mlx_ft.deploy.lm_studio import require_name
from mlx_ft.deploy.ollama_template import go_template, learn_turn_texts, without_first_token
from mlx_ft.errors import Fault, GateFailed, RunError
from mlx_ft.model.chat import ChatFormat, ChatRenderer
from mlx_ft.runs.models import RunModels, column_folders, read_run, require_finished
from mlx_ft.system.console import Console
from mlx_ft.system.files import file_sha256, replacing
from mlx_ft.text.repetition import degenerate_reason
from mlx_ft.text.safe import printable

MODELFILE = "Modelfile"
ADD_BOS = "tokenizer.ggml.add_bos_token"
PROMPT = "Hello, who are you?"
ANSWER_SECONDS = 600.0
SHOWN_CHARACTERS = 400
NO_TEMPLATE = (
    "# No TEMPLATE: what this model's chat template does cannot be said in Ollama's language.\n"
    "# Ollama then takes the nearest one of its own, or none. The GGUF carries the model's own\n"
    "# (Jinja), for programs that run it, such as llama.cpp.\n"
)
TEMPLATE_HEAD = (
    "# Says what the model's own chat template says, compared on several conversations; without\n"
    "# tools. The thinking mode and the date are those of the training.\n"
)


def gguf_file(made: RunModels) -> Path:
    """Return a run's GGUF file. Raises RunError when it has none, or the file was changed."""
    manifest = made.manifest("export")
    entry = manifest.info.get("gguf")
    if not entry:
        raise RunError(
            Fault(
                made.name,
                "has no GGUF file, and Ollama takes no other",
                "set export.gguf: q8_0 in the recipe and run it again",
            )
        )
    path = made.folder / "export" / str(entry["path"])
    recorded = manifest.files.get(str(entry["path"]))
    if recorded is None or file_sha256(path) != recorded["sha256"]:
        fix = f"delete {path.parent} and run the recipe again"
        raise RunError(Fault(str(path), "is not the file that the export wrote", fix))
    return path


def adds_first_token(gguf: Path) -> bool:
    """Return whether programs that read this GGUF add a BOS to every prompt by themselves.

    They do where the file does not say: Ollama's own templates rely on it.
    """
    try:
        field = GGUFReader(str(gguf)).get_field(ADD_BOS)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise RunError(Fault(str(gguf), f"no GGUF file ({error})", "export it again")) from error
    return True if field is None else bool(field.contents())


def template_for(renderer: ChatRenderer, adds_bos: bool) -> str | None:
    """Return the model's template in Ollama's language, or None when that cannot express it."""
    texts = learn_turn_texts(renderer.prompt_text)
    if texts is not None and adds_bos:
        texts = without_first_token(texts, renderer.tokenizer.bos_token)
    return None if texts is None else go_template(texts)


def modelfile(gguf_name: str, template: str | None, stops: Sequence[str]) -> str:
    """Return the text of a Modelfile without a system prompt."""
    said = NO_TEMPLATE if template is None else f'{TEMPLATE_HEAD}TEMPLATE """{template}"""\n'
    quoted = [stop for stop in stops if stop.isprintable() and '"' not in stop]
    parameters = "".join(f'PARAMETER stop "{stop}"\n' for stop in quoted)
    return f"FROM ./{gguf_name}\n{said}{parameters}"


def install_ollama(run: Path, *, name: str | None, console: Console) -> Iterator[str]:
    """Put a run's GGUF into Ollama; yield result lines.

    Where Ollama is not installed, the last line is the command to run. Raises GateFailed or
    RunError when the run is not ready or its model loops in Ollama, RunError when it has no GGUF or
    Ollama fails.
    """
    made = read_run(run)
    require_finished(made)
    gguf = gguf_file(made)
    shown = require_name(name or made.name.lower())
    tokenizer_folder, _ = column_folders(made, "quantized")
    renderer = ChatRenderer.from_folder(
        tokenizer_folder, ChatFormat(made.enable_thinking, made.date)
    )
    template = template_for(renderer, adds_first_token(gguf))
    if template is None:
        console.say("the model's chat template cannot be said in Ollama's language", "yellow")
    stops = [renderer.decode_raw([token]) for token in sorted(renderer.stop_ids)]
    path = gguf.parent / MODELFILE
    with replacing(path) as fresh:
        fresh.write_text(modelfile(gguf.name, template, stops), encoding="utf-8", newline="\n")
    yield f"modelfile {path}"
    command = ["ollama", "create", shown, "-f", str(path)]
    if shutil.which("ollama") is None:
        console.say("the command `ollama` is not here", "yellow")
        yield f"next     {shlex.join(command)}"
        return
    if subprocess.run(command, check=False).returncode != 0:
        raise RunError(
            Fault(shlex.join(command), "failed", "start Ollama (`ollama serve`), then try again")
        )
    yield f"answer   {_checked_answer(shown)}"
    yield f"next     ollama run {shown}"


def _checked_answer(name: str) -> str:
    """Return the model's answer to a plain prompt in Ollama. Raises GateFailed when it loops."""
    command = ["ollama", "run", name, PROMPT]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(
            Fault(shlex.join(command), f"no answer in {ANSWER_SECONDS:.0f} s", "try it by hand")
        ) from error
    if done.returncode != 0:
        raise RunError(Fault(shlex.join(command), "failed", "read what Ollama says above"))
    reason = degenerate_reason(done.stdout, None)
    shown = printable(" ".join(done.stdout.split()), SHOWN_CHARACTERS)
    if reason is not None:
        raise GateFailed(
            Fault(shlex.join(command), f"a bad answer ({reason}): {shown}", f"ollama rm {name}")
        )
    return shown
