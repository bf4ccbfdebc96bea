"""Ring attention: on several ranks what plain attention is on one; equal work, and no large tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron.config.schema import ModelSettings
from megatron.contract import Batch
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Axis, Mesh
from megatron.model.attention import AttentionContext, causal_attention
from megatron.parallel import ring
from megatron.parallel.collectives import ring_shift_async
from megatron.parallel.cost import MicroBatchShape
from megatron.parallel.random import DropoutKeys, head_keys
from megatron.parallel.ring import RingAttention, rank_chunks, score_blocks, shard_batch

ROWS, HEADS, SEQ, WIDTH = 2, 4, 32, 8
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def cp_axis(*, shared_memory: bool = True) -> Axis:
    if not dist.is_initialized():
        return Axis.alone("cp")
    return Mesh.build(Grid(cp=dist.get_world_size()), dist.get_rank(), shared_memory=shared_memory).cp


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whole_batch(seq: int = SEQ, documents: bool = False) -> Batch:
    """Documents begin at other places in each sample, also within a chunk."""
    tokens = torch.arange(ROWS * seq).view(ROWS, seq)
    begins = torch.tensor([[i in (3, seq // 2 + 1) for i in range(seq)], [i in (5, 6, seq - 4) for i in range(seq)]])
    ids = begins.cumsum(1) if documents else None
    return Batch(tokens, tokens + 1, torch.ones(ROWS, seq), torch.arange(seq).expand(ROWS, seq), torch.tensor([7, 8]), ids)


def attention(groups: int, dropout: float, documents: bool, dtype: torch.dtype, seq: int = SEQ, fault: str = ""):
    """(places of this rank, result, gradients of queries, keys and values there)."""
    axis, batch = cp_axis(), whole_batch(seq, documents)
    part = shard_batch(batch, axis)
    places = torch.arange(seq) if part.places is None else part.places
    q, k, v = (draw(ROWS, n, seq, WIDTH, seed=n * 10 + i, dtype=dtype) for i, n in enumerate((HEADS, groups, groups)))
    q, k, v = (x[:, :, places].clone().requires_grad_() for x in (2 * q, 2 * k, v))
    keys = DropoutKeys.from_samples(5, batch.samples, places, slice(None)) if dropout else None
    allowed = None
    if documents and part.places is None:
        allowed = (batch.documents.unsqueeze(2) == batch.documents.unsqueeze(1)).tril().unsqueeze(1)
    context = AttentionContext(allowed, dropout, keys, documents=part.documents)
    core_attention = causal_attention if axis.size == 1 else RingAttention(axis)
    if fault == "checkpoint":
        core_attention = partial(checkpoint, core_attention, use_reentrant=False)
    elif fault:
        break_ring(fault, axis)
    try:
        y = core_attention(q, k, v, context, head_keys(5, 3, range(HEADS)))
        (y * draw(ROWS, HEADS, seq, WIDTH, seed=99, dtype=dtype)[:, :, places]).sum().backward()
    finally:
        ring.ring_shift_async = ring_shift_async
    return places, y.detach(), q.grad, k.grad, v.grad


def break_ring(fault: str, axis: Axis) -> None:
    """On the last rank: what travels on is not what it should be."""

    def broken(x: torch.Tensor, cp: Axis):
        gradient = x.dtype == torch.float64  # keys and values are fp32 in this test, but for the gradients
        if axis.last and gradient == (fault == "gradient lost"):
            x = torch.zeros_like(x) if fault == "gradient lost" else x * 1.001
        return ring_shift_async(x, cp)

    ring.ring_shift_async = broken


def max_error(parts, whole) -> float:
    """The largest error of any part, relative to the whole tensor's largest value."""
    errors = [0.0]
    for places, *tensors in parts:
        for mine, expected in zip(tensors, whole[1:], strict=True):
            errors.append(float((mine - expected[:, :, places]).abs().max() / expected.abs().max()))
    return max(errors)


CASES = [(4, 0.0, False), (4, 0.3, False), (2, 0.0, True), (1, 0.3, True), (2, 0.3, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("groups", "dropout", "documents"), CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_result_and_gradients_are_those_of_plain_attention(world, groups, dropout, documents, dtype):
    whole = attention(groups, dropout, documents, dtype)
    parts = on_ranks(world, attention, groups, dropout, documents, dtype)
    assert torch.cat([places for places, *_ in parts]).sort().values.tolist() == list(range(SEQ))
    assert max_error(parts, whole) < TOLERANCE[dtype]


def test_bf16_ring_attention_is_as_near_as_one_process():
    """Statistics and sums are fp32: no further from fp32 than one process is."""
    exact = attention(2, 0.3, True, torch.float32)
    alone = max_error([(exact[0], *(x.float() for x in attention(2, 0.3, True, torch.bfloat16)[1:]))], exact)
    parts = on_ranks(4, attention, 2, 0.3, True, torch.bfloat16)
    assert max_error([(places, *(x.float() for x in tensors)) for places, *tensors in parts], exact) < max(1.5 * alone, 0.01)


def test_recomputed_attention_goes_around_again():
    whole = attention(2, 0.3, True, torch.float64)
    assert max_error(on_ranks(4, attention, 2, 0.3, True, torch.float64, SEQ, "checkpoint"), whole) < 1e-12


def exactly_kept(fault: str):
    """The fault tells the tensors that travel by their dtype: here gradients are fp64, the rest fp32."""
    statistics, ring._accumulation_dtype = ring._accumulation_dtype, lambda x: torch.float64
    try:
        return attention(2, 0.0, False, torch.float32, SEQ, fault)
    finally:
        ring._accumulation_dtype = statistics


@pytest.mark.parametrize("fault", ["", "gradient lost", "keys 0.1 % too large"])
@pytest.mark.parametrize("world", [2, 4])
def test_negative_controls(world, fault):
    error = max_error(on_ranks(world, exactly_kept, fault), attention(2, 0.0, False, torch.float32))
    assert (error < TOLERANCE[torch.float32]) == (not fault)
    assert (error > 10 * TOLERANCE[torch.float32]) == bool(fault)


# Work and memory.


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_rank_has_the_same_work_in_every_step(size):
    computed = Counter()
    for rank in range(size):
        steps = [score_blocks(rank, (rank - step) % size, size) for step in range(size)]
        assert [len(blocks) for blocks in steps] == [3] + [2] * (size - 1)
        assert [block.diagonal for block in steps[0]] == [True, True, False]
        assert not any(block.diagonal for blocks in steps[1:] for block in blocks)
        for step, blocks in enumerate(steps):
            source = (rank - step) % size
            for block in blocks:
                assert rank_chunks(rank, size)[block.query_half] == block.queries
                assert rank_chunks(source, size)[block.key_half] == block.keys
                computed[block.queries, block.keys] += 1
    # All that causality leaves, each once.
    assert computed == {(i, j): 1 for i in range(2 * size) for j in range(i + 1)}


def blocks_computed() -> tuple[int, int]:
    """Blocks of scores made forward, and backward."""
    counts, scores = Counter(), ring._RingPass.scores

    def counted(self, *arguments):
        counts[torch.is_grad_enabled(), "scores"] += 1
        return scores(self, *arguments)

    ring._RingPass.scores = counted
    try:
        axis = cp_axis()
        q, k, v = (draw(1, 2, SEQ // axis.size, WIDTH, seed=i).requires_grad_() for i in range(3))
        y = RingAttention(axis)(q, k, v, AttentionContext(), head_keys(1, 1, range(2)))
        forward = sum(counts.values())
        y.sum().backward()
    finally:
        ring._RingPass.scores = scores
    return forward, sum(counts.values()) - forward


@pytest.mark.parametrize("world", [2, 4])
def test_blocks_are_computed_once_forward_and_once_backward(world):
    assert on_ranks(world, blocks_computed) == [(2 * world + 1, 2 * world + 1)] * world


class TensorSizes(TorchDispatchMode):
    """Measures the tensors that operations make: elements of the largest; bytes that are there at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.peak, self.alive = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                storage = x.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
                    self.peak = max(self.peak, sum(self.alive.values()))
        return result


def memory(seq: int, dropout: float) -> tuple[int, int]:
    """Elements that are kept for the backward pass, without dropout's keys; elements of the largest tensor ever made."""
    axis, kept = cp_axis(shared_memory=False), {}  # its channels are allocated once, for all that a run sends
    part = shard_batch(whole_batch(seq, True), axis)
    q, k, v = (draw(ROWS, n, seq // axis.size, WIDTH, seed=n, dtype=torch.float32) for n in (HEADS, 2, 2))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    keys = DropoutKeys.from_samples(5, part.samples, part.places, slice(None))
    context = AttentionContext(None, dropout, keys, documents=part.documents)

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with TensorSizes() as made:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            y = RingAttention(axis)(q, k, v, context, head_keys(5, 3, range(HEADS)))
        layer_input = y.permute(2, 0, 1, 3).reshape(seq // axis.size, ROWS, HEADS * WIDTH)
        layer_input.sum().backward()
    assert layer_input.untyped_storage().data_ptr() in kept  # not a copy beside it
    return sum(kept.values()), made.largest


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("world", [2, 4])
def test_nothing_grows_with_the_square_of_the_sequence(world, dropout):
    seq = 256
    chunk, local = seq // (2 * world), seq // world
    for kept, largest in on_ranks(world, memory, seq, dropout):
        # Queries and result, keys and values, a log-sum-exp for each query.
        assert kept == ROWS * local * (2 * HEADS * WIDTH + 2 * 2 * WIDTH + HEADS)
        assert largest == ROWS * HEADS * chunk * chunk


def backward_bytes(model: ModelSettings, seq: int, dtype: torch.dtype) -> int:
    """The most bytes that the backward pass of one sequence holds at once, beside what was kept for it."""
    axis = cp_axis(shared_memory=False)
    heads, groups, width = model.num_attention_heads, model.num_query_groups, model.kv_channels
    q, k, v = (draw(1, n, seq // axis.size, width, seed=n, dtype=dtype) for n in (heads, groups, groups))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    keys = DropoutKeys.from_samples(5, torch.tensor([1]), torch.arange(seq // axis.size), slice(None))
    y = RingAttention(axis)(q, k, v, AttentionContext(None, model.attention_dropout, keys), head_keys(5, 3, range(heads)))
    above = torch.ones_like(y)
    with TensorSizes() as made:
        y.backward(above)
    return made.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("world", [2, 4])
def test_the_memory_that_a_dry_run_shows_is_what_a_backward_pass_takes(world, dropout, dtype):
    model = ModelSettings(num_attention_heads=4, num_query_groups=2, kv_channels=32, attention_dropout=dropout)
    shape = MicroBatchShape(rows=1, seq=1024 // world, hidden=128, element=dtype.itemsize)
    ring = RingAttention(Axis("cp", world, 0, tuple(range(world))))
    expected = ring.activation_bytes(shape, heads=4, groups=2, head_dim=32, dropout=dropout).transient
    for peak in on_ranks(world, backward_bytes, model, 1024, dtype):
        assert peak == pytest.approx(expected, rel=0.15)


# Sharing, and what is refused.


def shared_batch():
    return shard_batch(whole_batch(documents=True), cp_axis())


def test_ranks_share_a_micro_batch():
    whole = whole_batch(documents=True)
    for rank, part in enumerate(on_ranks(4, shared_batch)):
        chunks = [range(4 * c, 4 * c + 4) for c in (rank, 7 - rank)]
        assert part.places.tolist() == [place for chunk in chunks for place in chunk]
        for name in ("tokens", "labels", "loss_mask", "positions"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[:, part.places]), name
        assert torch.equal(part.samples, whole.samples) and torch.equal(part.documents, whole.documents)
    assert shard_batch(whole, Axis.alone("cp")) is whole


def test_what_does_not_cut_is_refused():
    with pytest.raises(ValueError, match="a sequence of 34 tokens does not cut into 2 x 2 equal chunks"):
        shard_batch(whole_batch(34), Axis("cp", 2, 0, (0, 1)))
    core_attention, keys = RingAttention(Axis("cp", 2, 0, (0, 1))), head_keys(1, 1, range(2))
    q, k = torch.zeros(1, 2, 1, WIDTH), torch.zeros(1, 2, 4, WIDTH)
    with pytest.raises(ValueError, match="not 1 queries and 4 keys; generate with context-parallel size 1"):
        core_attention(q, k, k, AttentionContext(), keys)
