"""Memory for a snapshot of a GPU where the system refuses to pin it, with a stand-in for CUDA's runtime."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from megatron.checkpoint.snapshot import _allocate_host_memory

CUDA = torch.device("cuda")
OUT_OF_MEMORY = 2


class FakeCudaRuntime:
    """A runtime that keeps its last error, as CUDA's does."""

    def __init__(self, status: int, *, asked: bool = True) -> None:
        self.status, self.last, self.pinned = status, 0, {}
        if asked:
            self.cudaGetLastError = self.take_error

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.last = self.status
        if self.status == 0:
            self.pinned[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0

    def take_error(self) -> int:
        error, self.last = self.last, 0
        return error


def kernel(runtime: FakeCudaRuntime):
    """A kernel of torch, which checks its own launch by the last error, whoever left it."""

    def launch(*shape: int, device: torch.device) -> torch.Tensor:
        if runtime.take_error():
            raise RuntimeError("CUDA error: out of memory")
        return torch.empty(shape)

    return launch


@pytest.mark.parametrize("asked", [True, False])
def test_a_refusal_leaves_no_error_for_the_next_kernel(monkeypatch, asked):
    """asked: whether the runtime can be asked for its error, which torch's binding cannot."""
    runtime = FakeCudaRuntime(OUT_OF_MEMORY, asked=asked)
    monkeypatch.setattr(torch, "ones", kernel(runtime))
    buffer = _allocate_host_memory(1000, CUDA, runtime)
    assert buffer.numel() == 1000 and not runtime.pinned
    torch.ones(1, device=CUDA)  # raises where the error is still there


def test_pinned_as_long_as_it_lives():
    runtime = FakeCudaRuntime(0)
    buffer = _allocate_host_memory(1000, CUDA, runtime)
    assert runtime.pinned == {buffer.data_ptr(): 1000}
    gone = weakref.ref(buffer)
    del buffer
    gc.collect()
    assert gone() is None and not runtime.pinned


def test_a_cpu_pins_nothing():
    assert _allocate_host_memory(10, torch.device("cpu"), FakeCudaRuntime(OUT_OF_MEMORY)).numel() == 10
