"""Snapshots of tensors on a GPU: the state of their moment, in pinned memory that is no larger than what is written."""

from __future__ import annotations

import pytest
import torch

from megatron.checkpoint.snapshot import Snapshot, _allocate_host_memory
from megatron.checkpoint.storage import TensorEntry

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def test_a_snapshot_of_a_gpu() -> None:
    device = torch.device("cuda")
    tensors = {f"w{i}": torch.randn(1000, 1001, device=device).to(t) for i, t in enumerate((torch.float32, torch.bfloat16))}
    before = {name: t.clone() for name, t in tensors.items()}
    entries = [TensorEntry(name, t.dtype, tuple(t.shape), t.detach) for name, t in tensors.items()]
    snapshot = Snapshot(device)
    for _ in range(2):
        taken = snapshot.copy(entries)
        for tensor in tensors.values():
            tensor.zero_()
        torch.cuda.synchronize()
        for entry in taken:
            data = entry.data()
            assert data.device.type == "cpu" and data.is_pinned()
            assert torch.equal(data, before[entry.key].cpu())
        for name, tensor in tensors.items():
            tensor.copy_(before[name])
    assert snapshot.bytes == sum(t.nbytes for t in tensors.values())
    taken = Snapshot(device).copy(entries[:1])  # a second one, and after it the first goes
    del snapshot
    assert torch.equal(taken[0].data(), before[taken[0].key].cpu())


class RuntimePinningTwice:
    """torch's runtime, asked to pin the same memory again, which it refuses."""

    def cudaHostRegister(self, *memory: int) -> int:
        runtime = torch.cuda.cudart()
        assert int(runtime.cudaHostRegister(*memory)) == 0
        refused = int(runtime.cudaHostRegister(*memory))
        assert int(runtime.cudaHostUnregister(memory[0])) == 0
        return refused


def test_a_refused_registration_leaves_no_error() -> None:
    buffer = _allocate_host_memory(1 << 20, torch.device("cuda"), RuntimePinningTwice())
    assert not buffer.is_pinned()
    assert torch.ones(3, device="cuda").sum().item() == 3.0
