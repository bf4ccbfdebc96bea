"""Dropout masks as functions of the token's place, and initial weights as functions of the name."""

from __future__ import annotations

import math

import pytest
import torch
from reference import GPT2, LLAMA

from megatron.config.resolve import resolve_model
from megatron.contract import StagePart
from megatron.model.gpt import GPT
from megatron.model.init import initialize
from megatron.parallel.random import DropoutKeys, derive_seed, drop, head_keys, site_key
from megatron.parallel.spec import param_spec
from megatron.parallel.tensor_parallel import TensorParallel


def keys(samples=(3, 4, 2**40 + 3), seq: int = 64, local: slice = slice(None), seed: int = 1) -> DropoutKeys:
    return DropoutKeys.from_samples(seed, torch.tensor(samples), torch.arange(seq), local)


def random_features(layer: int, site: str) -> torch.Tensor:
    return keys().features(site_key(1, layer, site), 256)


def test_masks_are_uniform_and_independent():
    numbers = random_features(5, "mlp").double() / 2**32  # in [-1/2, 1/2)
    count = numbers.numel()
    assert abs(numbers.mean()) < 4 / math.sqrt(12 * count)
    assert abs(numbers.var() - 1 / 12) < 0.001
    assert numbers.unique().numel() > 0.99 * count
    others = {
        "layer": random_features(6, "mlp"),
        "site": random_features(5, "attention"),
        "seed": keys(seed=2).features(site_key(2, 5, "mlp"), 256),
        "sample": keys(samples=(7, 8, 9)).features(site_key(1, 5, "mlp"), 256),
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([numbers.flatten(), other.double().flatten() / 2**32]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(count), name
    for dim in range(3):  # neighbours in sequence, batch and feature
        a, b = numbers.narrow(dim, 0, numbers.shape[dim] - 1), numbers.narrow(dim, 1, numbers.shape[dim] - 1)
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 5 / math.sqrt(count), dim


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
def test_drop_keeps_the_mean(probability):
    x = torch.ones(64, 3, 256, requires_grad=True)
    y = drop(x, random_features(0, "mlp"), probability)
    assert abs((y == 0).double().mean() - probability) < 0.01
    assert abs(y.mean() - 1) < 0.03
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_any_piece_of_a_mask_is_that_piece_of_the_whole():
    whole = keys()
    shard, site = keys(local=slice(16, 32)), site_key(1, 2, "mlp")
    assert torch.equal(shard.features(site, 32), whole.features(site, 32)[16:32])
    assert torch.equal(whole.attention(head_keys(1, 2, range(2, 4))), whole.attention(head_keys(1, 2, range(8)))[:, 2:4])
    heads = head_keys(1, 2, range(4))
    part = DropoutKeys.from_samples(
        1, torch.tensor((3, 4, 2**40 + 3)), torch.arange(24, 48), slice(None)
    )  # those of another rank
    assert torch.equal(part.attention(heads, slice(8, 16), range(16, 40)), whole.attention(heads)[:, :, 32:40, 16:40])
    one = keys(samples=(4,))  # another micro-batch that holds the second sample
    assert torch.equal(one.features(site, 32)[:, 0], whole.features(site, 32)[:, 1])


def test_large_sample_numbers_are_told_apart():
    """Samples 3 and 2^40 + 3 share their low 32 bits."""
    numbers = random_features(0, "mlp")
    assert not torch.equal(numbers[:, 0], numbers[:, 2])


def test_seeds_of_different_things_differ():
    assert len({derive_seed(1, "weights", name) for name in "abc"} | {derive_seed(2, "weights", "a")}) == 4
    assert all(0 <= derive_seed(s, "x") < 2**63 for s in range(100))


@pytest.mark.parametrize("model", [GPT2, LLAMA])
def test_initial_weights_have_megatrons_spread(model):
    config = resolve_model(model)
    gpt = GPT(config, StagePart(range(2), True, True), TensorParallel.alone())
    initialize(gpt, config, 7)
    for name, p in gpt.named_parameters():
        spec, values = param_spec(p), param_spec(p).local(p).detach()
        assert spec.name == name
        if name.endswith("bias"):
            assert not values.any() and not spec.decay
        elif p.dim() == 1:
            assert torch.equal(values, torch.ones_like(values)) and not spec.decay
        else:
            scale = 0.02 / math.sqrt(2 * 2) if "dense" in name or "down" in name else 0.02
            assert abs(values.std() / scale - 1) < 6 / math.sqrt(2 * values.numel()), name
            assert spec.decay
    assert not gpt.embedding.word.weight[127:].any(), "padding is zero"
