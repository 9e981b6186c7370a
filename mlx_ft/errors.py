"""Everything that a user can be told, and the exit code that goes with it.

    MlxFtError                 a person can act on it: printed without a traceback
    |-- InputError (exit 2)    what was asked for is wrong
    |   |-- RecipeError        the recipe file or a --set
    |   |-- DataError          the training or evaluation rows
    |   |-- ModelError         a model name, folder, tokenizer or template
    |   `-- RunError           a run folder, an output path, disk space
    |-- GateFailed (exit 1)    a bad model was stopped
    `-- Interrupted (exit 130) Ctrl-C, SIGTERM or SIGHUP, after what was finished was kept

Any other exception that reaches the command line is our bug and keeps its traceback.
A message reads: where: what was found - what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: `where` (file:line or key), `found`, and the `fix` to try."""

    where: str
    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.found} - {self.fix}"


class MlxFtError(Exception):
    """Base of every error that a user can fix; carries all faults found, not only the first."""

    exit_code = 2

    def __init__(self, faults: Sequence[Fault] | Fault):
        self.faults: tuple[Fault, ...] = (faults,) if isinstance(faults, Fault) else tuple(faults)
        assert self.faults, "an error without a fault cannot be acted on"
        super().__init__("\n".join(str(fault) for fault in self.faults))


class InputError(MlxFtError):
    """What was asked for is wrong (exit code 2)."""


class RecipeError(InputError):
    """The recipe, or a value given on the command line."""


class DataError(InputError):
    """Training or evaluation rows."""


class ModelError(InputError):
    """A model's name, folder, tokenizer or chat template."""


class RunError(InputError):
    """A run folder, an output path, or the disk under it."""


class GateFailed(MlxFtError):
    """A bad model was stopped, with its evidence (exit code 1)."""

    exit_code = 1


class Interrupted(MlxFtError):
    """Somebody stopped the run; what was finished is kept (exit code 130)."""

    exit_code = 130
