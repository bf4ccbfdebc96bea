"""Layers that only BERT has: attention in both directions, also around the ring, and a bias at the output layer."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks

from megatron.contract import Batch
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Axis, Mesh
from megatron.model.attention import AttentionContext, bidirectional_attention
from megatron.parallel.cross_entropy import fused_linear_cross_entropy
from megatron.parallel.embedding import VocabShard
from megatron.parallel.random import DropoutKeys, head_keys
from megatron.parallel.ring import RingAttention, score_blocks, shard_batch

ROWS, HEADS, SEQ, WIDTH = 2, 4, 32, 8


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def axis(name: str) -> Axis:
    if not dist.is_initialized():
        return Axis.alone(name)
    mesh: Mesh = Mesh.build(Grid(**{name: dist.get_world_size()}), dist.get_rank())
    return getattr(mesh, name)


def attention(groups: int, dropout: float, padded: bool, causal: bool = False):
    """(places of this rank, result, gradients of queries, keys and values there); the second row ends in padding."""
    cp, tokens = axis("cp"), torch.zeros(ROWS, SEQ, dtype=torch.int64)
    padding = (torch.arange(SEQ) >= torch.tensor([[SEQ], [19]])).long() if padded else None
    batch = Batch(tokens, tokens, torch.ones(ROWS, SEQ), tokens, torch.tensor([7, 8]), padding)
    part = shard_batch(batch, cp)
    places = torch.arange(SEQ) if part.places is None else part.places
    q, k, v = (draw(ROWS, n, SEQ, WIDTH, seed=n * 10 + i) for i, n in enumerate((HEADS, groups, groups)))
    q, k, v = (x[:, :, places].clone().requires_grad_() for x in (2 * q, 2 * k, v))
    keys = DropoutKeys.from_samples(5, batch.samples, places, slice(None)) if dropout else None
    alone = padded and part.places is None
    allowed = (padding.unsqueeze(2) == padding.unsqueeze(1)).unsqueeze(1) if alone else None
    core_attention = bidirectional_attention if cp.size == 1 else RingAttention(cp, causal=causal)
    y = core_attention(
        q, k, v, AttentionContext(allowed, dropout, keys, documents=part.documents), head_keys(5, 3, range(HEADS))
    )
    (y * draw(ROWS, HEADS, SEQ, WIDTH, seed=99)[:, :, places]).sum().backward()
    return places, y.detach(), q.grad, k.grad, v.grad


def max_error(parts, whole) -> float:
    """The largest error of any part, relative to the whole tensor's largest value."""
    return max(
        float((mine - expected[:, :, places]).abs().max() / expected.abs().max())
        for places, *tensors in parts
        for mine, expected in zip(tensors, whole[1:], strict=True)
    )


@pytest.mark.parametrize("groups", [4, 2])
def test_each_token_sees_all_others_of_its_own_kind(groups):
    """Against softmax written out."""
    _, y, *_ = attention(groups, 0.0, padded=True)
    q, k, v = (draw(ROWS, n, SEQ, WIDTH, seed=n * 10 + i) for i, n in enumerate((HEADS, groups, groups)))
    k, v = (x.repeat_interleave(HEADS // groups, dim=1) for x in (k, v))
    scores = 2 * q @ (2 * k).transpose(-1, -2) / WIDTH**0.5
    scores[1, :, :19, 19:] = scores[1, :, 19:, :19] = -torch.inf
    torch.testing.assert_close(y, scores.softmax(-1) @ v)


@pytest.mark.parametrize(("groups", "dropout", "padded"), [(4, 0.0, False), (4, 0.3, True), (2, 0.0, True), (1, 0.3, False)])
@pytest.mark.parametrize("world", [2, 4])
def test_around_the_ring_it_is_the_same(world, groups, dropout, padded):
    whole = attention(groups, dropout, padded)
    parts = on_ranks(world, attention, groups, dropout, padded)
    assert torch.cat([places for places, *_ in parts]).sort().values.tolist() == list(range(SEQ))
    assert max_error(parts, whole) < 1e-12


def test_negative_control_a_causal_ring_is_another():
    assert max_error(on_ranks(2, attention, 4, 0.0, True, True), attention(4, 0.0, padded=True)) > 0.1


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_rank_does_every_block_of_its_queries(size):
    for rank in range(size):
        blocks = [(b.queries, b.keys) for source in range(size) for b in score_blocks(rank, source, size, causal=False)]
        assert len(blocks) == len(set(blocks)) == 4 * size
        assert {keys for _, keys in blocks} == set(range(2 * size))


def loss_with_bias(rows: int | None):
    """Loss; gradients of input, weight and bias, those of the vocabulary for this rank's true rows."""
    tp, vocab = axis("tp"), 45
    shard = VocabShard.for_rank(vocab, tp, 8)
    x, mask = draw(20, 6, seed=1).requires_grad_(), torch.rand(20, generator=torch.Generator().manual_seed(2)).float()
    own = slice(shard.start, shard.start + shard.size)
    weight, bias = torch.zeros(shard.padded_size, 6, dtype=torch.float64), torch.zeros(shard.padded_size, dtype=torch.float64)
    weight[: shard.size], bias[: shard.size] = draw(vocab, 6, seed=3)[own], draw(vocab, seed=4)[own]
    weight.requires_grad_(), bias.requires_grad_()
    labels = torch.arange(20) * 7 % vocab
    loss = fused_linear_cross_entropy(x, weight, labels, mask, shard, tp, rows=rows, bias=bias)
    (3.0 * loss).backward()
    return loss.item(), x.grad, own, weight.grad[: shard.size], bias.grad[: shard.size], bias.grad[shard.size :]


def plain_loss():
    x, mask = draw(20, 6, seed=1).requires_grad_(), torch.rand(20, generator=torch.Generator().manual_seed(2)).double()
    weight, bias = draw(45, 6, seed=3).requires_grad_(), draw(45, seed=4).requires_grad_()
    loss = (F.cross_entropy(F.linear(x, weight, bias), torch.arange(20) * 7 % 45, reduction="none") * mask).sum()
    (3.0 * loss).backward()
    return loss.item(), x.grad, weight.grad, bias.grad


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_loss_with_a_bias(world, rows):
    """In one piece and in chunks, with the vocabulary cut; padding rows get no gradient."""
    loss, x, weight, bias = plain_loss()
    found = on_ranks(world, loss_with_bias, rows) if world > 1 else [loss_with_bias(rows)]
    close = dict(rtol=1e-5, atol=1e-6)
    for value, _, own, of_weight, of_bias, of_padding in found:
        assert value == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(of_weight, weight[own], **close)
        torch.testing.assert_close(of_bias, bias[own], **close)
        assert not of_padding.any()
    torch.testing.assert_close(sum(of_x for _, of_x, *_ in found), x, **close)
