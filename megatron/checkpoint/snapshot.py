"""Copy a rank's tensors into host memory, so that they can be written while training continues."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.storage import TensorEntry, sort_for_file


class Snapshot:
    """Host buffer of exactly the bytes that this rank writes, reused by every save.

    device: device of the tensors. For a GPU the buffer is pinned, and the copies are asynchronous.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @property
    def bytes(self) -> int:
        """Size of the buffer in bytes."""
        return self._buffer.numel()

    def copy(self, entries: Sequence[TensorEntry]) -> list[TensorEntry]:
        """Return the same entries with copies of their data in the buffer, which the next call overwrites."""
        size = sum(entry.bytes for entry in entries)
        if size != self._buffer.numel():
            self._buffer = torch.empty(0, dtype=torch.uint8)  # free the old buffer first: memory may not suffice for two
            self._buffer = _allocate_host_memory(size, self._device)
        copied, offset = [], 0
        for entry in sort_for_file(entries):  # the widest types first, so every view is aligned
            view = self._buffer[offset : offset + entry.bytes].view(entry.dtype).view(entry.shape)
            view.copy_(entry.data(), non_blocking=True)
            copied.append(replace(entry, data=_make_getter(view)))
            offset += entry.bytes
        # Training may change the tensors once this returns, so the asynchronous copies must be finished.
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return copied


def _make_getter(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _allocate_host_memory(size: int, device: torch.device, runtime: Any = None) -> Tensor:
    """Allocate `size` bytes of host memory, pinned for a GPU.

    The memory is registered with CUDA, because torch's pinned allocator would round its size up to a power of two.
    runtime: binding of the CUDA runtime; None: torch's.
    """
    buffer = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda" and size:
        runtime = runtime or torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(buffer.data_ptr(), size, 0)) == 0:
            weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
        else:  # refused, for example by a limit on locked memory: the copies are then slower
            _clear_cuda_error(runtime, device)
    return buffer


def _clear_cuda_error(runtime: Any, device: torch.device) -> None:
    """Clear this thread's last CUDA error, which torch would otherwise attribute to the next kernel."""
    # torch's binding of the runtime has no cudaGetLastError, so it is looked up among the process's loaded libraries.
    last_error = getattr(runtime, "cudaGetLastError", None) or getattr(ctypes.CDLL(None), "cudaGetLastError", None)
    if last_error is not None:
        last_error()
    # If it was not found, a throwaway kernel consumes the error when torch checks its launch.
    with suppress(RuntimeError, AssertionError):
        torch.ones(1, device=device)
