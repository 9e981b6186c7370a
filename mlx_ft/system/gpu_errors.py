"""Words of GPU and memory failures, as MLX and the systems below it raise them.

Does: tell a failure of the device from a mistake in code, and say what it means and what helps.
Does not: catch, or restart anything.

Sources: the texts in MLX 0.32.4's macOS library (`[METAL] Command buffer execution failed: ...`,
`[metal::malloc] ...`, `[metal::CommandEncoder] ...`, `[metal::Device] ...`, `[Event::Event] ...`),
`kIOGPUCommandBufferCallbackError...` of macOS, and CUDA's error names. Texts of missing or broken
kernels are left out: a restart does not mend an installation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """Why a process died.

    words: the cause.
    fix: remedy to try.
    memory: it ran out of memory.
    another_run: the remedy changes the run's identity.
    """

    words: str
    fix: str
    memory: bool = False
    another_run: bool = False


LESS_MEMORY = (
    "close what else needs memory, or lower train.micro_batch_tokens, train.num_layers or "
    "data.max_seq_length, or set train.grad_checkpoint: true"
)
OTHER_WORK = "close what else uses the GPU; a restart of the machine clears a GPU that stays broken"


def short_of_memory(words: str) -> Cause:
    """Return the cause of a process that ran out of memory."""
    return Cause(words, LESS_MEMORY, memory=True, another_run=True)


_GPU_MEMORY = short_of_memory("the GPU ran out of memory")
_MEMORY = short_of_memory("memory could not be allocated")
_TOO_LONG = Cause(
    "a GPU command took longer than Metal allows",
    "lower train.micro_batch_tokens",
    another_run=True,
)
_HUNG = Cause(
    "a GPU command hung and was ended by the system",
    "lower train.micro_batch_tokens when it happens again",
    another_run=True,
)
_VICTIM = Cause("the GPU was reset because of another program's work", OTHER_WORK)
_IGNORED = Cause("the GPU refused work after earlier errors of the same process", OTHER_WORK)
_INTERNAL = Cause("the GPU or its driver reported an internal error", OTHER_WORK)
_EVENT = Cause("Metal could not create a shared event", OTHER_WORK)
_HANDLES = Cause(
    "Metal ran out of resource handles, which only a new process has again",
    "set train.segment_steps, so that a new process goes on before the limit is reached",
)

# The most telling first.
MESSAGES: Mapping[str, Cause] = {
    "ErrorImpactingInteractivity": Cause(
        "macOS stopped its work on the GPU because the display had to wait (Metal's watchdog)",
        "let the display sleep while it trains, close what draws on the screen, or lower "
        "train.micro_batch_tokens; setting AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 has helped some",
        another_run=True,
    ),
    "Resource limit (": _HANDLES,
    "CallbackErrorTimeout": _TOO_LONG,
    "CallbackErrorHang": _HUNG,
    "Caused GPU Hang": _HUNG,
    "CallbackErrorInnocentVictim": _VICTIM,
    "Innocent Victim": _VICTIM,
    "victim of GPU error": _VICTIM,
    "CallbackErrorSubmissionsIgnored": _IGNORED,
    "for causing prior/excessive GPU errors": _IGNORED,
    "CallbackErrorAccessRevoked": _IGNORED,
    "CallbackErrorOutOfMemory": _GPU_MEMORY,
    "Insufficient Memory": _GPU_MEMORY,
    "Attempting to allocate": _GPU_MEMORY,
    "cudaErrorMemoryAllocation": _GPU_MEMORY,
    "CallbackErrorPageFault": _INTERNAL,
    "CallbackErrorStackOverflow": _INTERNAL,
    "Internal Error (": _INTERNAL,
    "Failed to create Metal shared event": _EVENT,
    "Failed to make new command queue": _HANDLES,
    "Unable to construct residency set": _HANDLES,
    "No Metal device available": Cause(
        "no GPU can be had in this session (headless, sandboxed or virtual macOS)",
        "run it from a login session of the Mac itself",
    ),
    "Command buffer execution failed": _INTERNAL,
    "Unable to allocate": _MEMORY,
    "bad_alloc": _MEMORY,
    "MemoryError": _MEMORY,
    "Cannot allocate memory": _MEMORY,
    "out of memory": _MEMORY,
    "CUDA error": _INTERNAL,
    "cudaError": _INTERNAL,
}


def known_cause(text: str) -> Cause | None:
    """Return the device failure that a text tells of, None for any other text."""
    return next((cause for message, cause in MESSAGES.items() if message in text), None)


def device_failure(error: Exception) -> Cause | None:
    """Return the failure of the GPU or of memory that an exception is, None for one of the code."""
    if not isinstance(error, (RuntimeError, MemoryError)):
        return None
    return known_cause(f"{type(error).__name__}: {error}")
