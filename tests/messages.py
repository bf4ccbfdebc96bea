"""Objects between processes of the tests, with the tensors in them as bytes.

Torch's own way makes a shared file for each tensor: for the hundreds that a test compares, a quarter of what its ranks compute.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from multiprocessing.connection import Connection
from typing import Any

import torch


def send(connection: Connection, message: object) -> None:
    """Send what `connection.recv()` is to return at the other end."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer)
    pickler.dispatch_table = {**copyreg.dispatch_table, torch.Tensor: reduce_tensor}
    pickler.dump(message)
    connection.send_bytes(buffer.getbuffer())


def reduce_tensor(x: torch.Tensor) -> tuple[Any, ...]:
    """Pickle a tensor by its bytes; one that is no plain tensor, or belongs to a graph, as torch.save does."""
    plain = x.device.type == "cpu" and x.layout is torch.strided and not (x.requires_grad or x.is_neg() or x.is_conj())
    if not plain or not x.numel():
        return x.__reduce_ex__(2)
    return restore_tensor, (x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), x.dtype, x.shape)


def restore_tensor(data: bytes, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
