"""Every failure of a GPU is known by its words, and no mistake in code is taken for one."""

import pytest

from mlx_ft.system.gpu_errors import device_failure, known_cause

BUFFER = "[METAL] Command buffer execution failed: "
# As macOS, MLX and CUDA word them; the second: whether fewer tokens at a time help.
FAILURES = {
    BUFFER + "Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)": False,
    BUFFER + "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)": False,
    BUFFER + "Innocent Victim (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)": False,
    BUFFER + "Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBuffer": False,
    BUFFER + "Ignored (for causing prior/excessive GPU errors) (00000004:kIOGPUCommand"
    "BufferCallbackErrorSubmissionsIgnored)": False,
    BUFFER + "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)": True,
    BUFFER + "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackError"
    "ImpactingInteractivity)": False,
    BUFFER + "Internal Error (0000000e:Internal Error)": False,
    BUFFER + "GPU Address Fault Error (0000000b:kIOGPUCommandBufferCallbackErrorPageFault)": False,
    BUFFER + "some error of a later system": False,
    "[metal::malloc] Resource limit (499000) exceeded.": False,
    "[metal::malloc] Attempting to allocate 20000000000 bytes which is greater than": True,
    "[malloc_or_wait] Unable to allocate 20000000000 bytes.": True,
    "[Event::Event] Failed to create Metal shared event.": False,
    "[metal::CommandEncoder] Failed to make new command queue.": False,
    "[metal::Device] Unable to construct residency set.": False,
    "[metal::load_device] No Metal device available. This typically occurs in headless": False,
    "cudaMallocAsync(&data, size, stream) failed: out of memory": True,
    "CUDA error: an illegal memory access was encountered": False,
}


@pytest.mark.parametrize(("words", "memory"), FAILURES.items())
def test_a_failure_of_the_gpu_is_known(words: str, memory: bool) -> None:
    cause = known_cause(f"Traceback\nRuntimeError: {words}\n")
    assert cause is not None and cause.memory == memory and cause.fix
    assert device_failure(RuntimeError(words)) is cause


@pytest.mark.parametrize(
    "error",
    [
        ValueError("shapes (3, 4) and (5, 6) cannot be broadcast"),
        RuntimeError("[GatherMM::eval] Currently only supports float32."),
        RuntimeError("[metal::Device] Unable to load kernel steel_gemm_fused"),
        RuntimeError("the vector kernels do not produce a logsumexp"),
        KeyError("self_attn"),
    ],
)
def test_a_mistake_in_code_is_not(error: Exception) -> None:
    assert device_failure(error) is None


def test_memory_of_the_system_counts_too() -> None:
    assert device_failure(MemoryError()) is not None
