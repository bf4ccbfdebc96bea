"""Copy a rank's tensors into host memory, as they are at one moment, so that they can be written while training goes on."""

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
    """Buffer of exactly the bytes that this rank writes, filled again at every save.

    device: where the tensors live. On a GPU the buffer is pinned, and all copies are under way at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @property
    def bytes(self) -> int:
        """Bytes of host memory that are held."""
        return self._buffer.numel()

    def copy(self, entries: Sequence[TensorEntry]) -> list[TensorEntry]:
        """Return the same entries with copies of their data, which nobody changes before the next call."""
        size = sum(entry.bytes for entry in entries)
        if size != self._buffer.numel():
            self._buffer = torch.empty(0, dtype=torch.uint8)  # let go first: two at a time could be too much
            self._buffer = _host_memory(size, self._device)
        taken, offset = [], 0
        for entry in sort_for_file(entries):  # the widest types first, so every view is aligned
            view = self._buffer[offset : offset + entry.bytes].view(entry.dtype).view(entry.shape)
            view.copy_(entry.data(), non_blocking=True)
            taken.append(replace(entry, data=_getter(view)))
            offset += entry.bytes
        # Training may change the tensors once this returns, so all copies must have been made, not only asked for.
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return taken


def _getter(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _host_memory(size: int, device: torch.device, runtime: Any = None) -> Tensor:
    """Allocate `size` bytes, pinned for a GPU.

    Registered with CUDA, not taken from torch's pinned allocator, which would round up to a power of two: up to twice the
    memory. runtime: CUDA's, by default torch's.
    """
    buffer = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda" and size:
        runtime = runtime or torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(buffer.data_ptr(), size, 0)) == 0:
            weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
        else:  # a limit on locked memory; the copies are slower, and right all the same
            _forget_error(runtime, device)
    return buffer


def _forget_error(runtime: Any, device: torch.device) -> None:
    """Clear what a refused call leaves: CUDA keeps a thread's last error, and torch blames the next kernel for it."""
    # torch's binding of the runtime has no call for that, so the loaded library is asked, where it can be reached.
    last_error = getattr(runtime, "cudaGetLastError", None) or getattr(ctypes.CDLL(None), "cudaGetLastError", None)
    if last_error is not None:
        last_error()
    # A kernel whose failure costs nothing goes first: torch's check of its launch takes an error that is still there.
    with suppress(RuntimeError, AssertionError):
        torch.ones(1, device=device)
