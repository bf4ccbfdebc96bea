"""The backward pass in two parts, I and W, and weight gradients that their products add to the optimizer's buffer."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from reference import GPT2, LLAMA, SEQ, Setting, train_steps
from torch import nn

from megatron.config.resolve import resolve_model
from megatron.config.schema import ModelSettings
from megatron.contract import Batch, StagePart
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.job import Job
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Axis, Mesh
from megatron.model.gpt import GPT
from megatron.model.init import initialize
from megatron.optim.buffers import flat_buffers
from megatron.parallel import weight_grad
from megatron.parallel.spec import param_spec, register_grad_ready_hook
from megatron.parallel.tensor_parallel import TensorParallel
from megatron.parallel.weight_grad import (
    DeferredWeightGrad,
    WeightGradStore,
    attach_weight_grad_store,
    supports_fused_weight_grad,
)
from megatron.train import run as run_module

ROWS = 2
FORMS = {
    "gpt2": GPT2,
    "no biases": replace(GPT2, add_bias_linear=False),
    "swiglu": replace(LLAMA, add_bias_linear=True),
    "llama": LLAMA,
}
LINEAR = ("qkv", "dense", "gate", "up", "down")


def tp_axis() -> Axis:
    return Mesh.build(Grid(tp=dist.get_world_size()), dist.get_rank()).tp if dist.is_initialized() else Axis.alone("tp")


def stage(form: ModelSettings, sequence_parallel: bool, dtype: torch.dtype) -> GPT:
    """One layer between others, with weights and biases that hide nothing."""
    config = resolve_model(form)
    model = GPT(config, StagePart(range(1, 2), False, False), TensorParallel(tp_axis(), sequence_parallel), dtype=dtype)
    initialize(model, config, 3)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                spec = param_spec(p)
                noise = torch.randn(spec.shape, generator=torch.Generator().manual_seed(p.numel()))
                spec.local(p).add_(0.1 * noise[spec.part.slices])
    return model


class StagePass:
    """One stage, one micro-batch, up to the gradient of its output."""

    def __init__(self, model: GPT, number: int = 0) -> None:
        tokens = torch.zeros(ROWS, SEQ, dtype=torch.int64)
        positions = torch.arange(SEQ).expand(ROWS, SEQ)
        batch = Batch(tokens, tokens, torch.ones(ROWS, SEQ), positions, torch.arange(ROWS))
        # Where the sequence is whole, all ranks of tp have the same; where it is cut, each has its own part.
        own = model.tp.axis.rank if model.tp.sequence_parallel else 0
        generator = torch.Generator().manual_seed(100 * number + own)
        shape = model.hidden_shape(batch)
        self.x = torch.randn(shape, generator=generator).to(model.dtype).requires_grad_()
        self.y = model.hidden(self.x, batch)
        self.grad = torch.randn(shape, generator=generator).to(model.dtype)

    def backward(self) -> None:
        torch.autograd.backward(self.y, self.grad)


def is_linear(name: str) -> bool:
    return any(f".{layer}." in name for layer in LINEAR)


def named_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def unsplit_gradients(form: ModelSettings, sequence_parallel: bool, dtype: torch.dtype, keeping: bool):
    """Gradients of two micro-batches, backward in one. keeping: through layers that could have kept their products."""
    model = stage(form, sequence_parallel, dtype)
    if keeping:
        attach_weight_grad_store(model, WeightGradStore())
    passes = [StagePass(model, number) for number in range(2)]
    for each in passes:
        each.backward()
    return named_gradients(model), [each.x.grad for each in passes]


def split(form: ModelSettings, sequence_parallel: bool, dtype: torch.dtype):
    """The same in two parts, both W after both I; what there was between them; and what W did with autograd."""
    model, store = stage(form, sequence_parallel, dtype), WeightGradStore()
    attach_weight_grad_store(model, store)
    passes = [StagePass(model, number) for number in range(2)]
    kept: list[list[DeferredWeightGrad]] = []
    for each in passes:
        with store.deferring() as products:
            each.backward()
        kept.append(products)
    assert not store.is_deferring
    between = named_gradients(model)
    touched: list[str] = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: touched.append(name))
    backward, torch.autograd.backward = torch.autograd.backward, None
    try:
        for products in kept:
            for product in products:
                product.run()
    finally:
        torch.autograd.backward = backward
    assert not touched, "W went through autograd"
    assert not any(p.grad.requires_grad or p.grad.grad_fn for p in model.parameters())
    return named_gradients(model), [each.x.grad for each in passes], between


def same_gradients(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def compare(form: ModelSettings, sequence_parallel: bool, dtype: torch.dtype) -> list[str]:
    """Names of the gradients that I alone makes."""
    expected, expected_x = unsplit_gradients(form, sequence_parallel, dtype, keeping=False)
    ready, ready_x = unsplit_gradients(form, sequence_parallel, dtype, keeping=True)
    got, got_x, between = split(form, sequence_parallel, dtype)
    assert len(expected) == len(got) and all(g.any() for g in expected.values())
    assert same_gradients(ready, expected) and same_gradients(got, expected), "gradients of the weights"
    for a, b, c in zip(expected_x, ready_x, got_x, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c), "gradient of the input"
    assert all(torch.equal(between[name], expected[name]) for name in between)
    return sorted(between)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_i_and_w_are_the_backward_pass_to_the_bit(tp, sequence_parallel, form, dtype):
    arguments = FORMS[form], sequence_parallel, dtype
    (made_by_i,) = {tuple(r) for r in (on_ranks(tp, compare, *arguments) if tp > 1 else [compare(*arguments)])}
    # A weight of a linear layer waits for W; so does its bias, but for one that is added after a sum over ranks.
    weights = {name for name in made_by_i if is_linear(name) and name.endswith(".weight")}
    biases = {name for name in made_by_i if is_linear(name) and name.endswith(".bias")}
    assert not weights
    added_later = {f"layers.1.{layer}.bias" for layer in ("attention.dense", "mlp.down")}
    assert biases == (added_later if tp > 1 and FORMS[form].add_bias_linear else set())
    assert any("norm" in name for name in made_by_i)


def factors(sequence_parallel: bool):
    model, store = stage(LLAMA, sequence_parallel, torch.float32), WeightGradStore()
    attach_weight_grad_store(model, store)
    each = StagePass(model)
    with store.deferring() as products:
        each.backward()
    return [(tuple(p.weight.shape), p.bias is None, tuple(p.x.shape), tuple(p.grad.shape)) for p in products]


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_what_waits_for_w_is_two_factors_for_each_linear_layer(tp, sequence_parallel):
    """Whole in the sequence, cut in the features; in the order of the backward pass."""
    found = on_ranks(tp, factors, sequence_parallel) if tp > 1 else [factors(sequence_parallel)]
    hidden, ffn, qkv = 32, resolve_model(LLAMA).ffn_hidden_size, 64
    shapes = [(hidden, ffn // tp), *[(ffn // tp, hidden)] * 2, (hidden, hidden // tp), (qkv // tp, hidden)]
    for products in found:
        assert [p[0] for p in products] == shapes
        for (out, into), no_bias, x, grad in products:
            assert no_bias and x == (SEQ, ROWS, into) and grad == (SEQ, ROWS, out)


class Sentinel:
    """Lives as long as a place of the graph."""


class MarkGraph(torch.autograd.Function):
    """The identity; its place of the graph holds a sentinel."""

    @staticmethod
    def forward(ctx, x, sentinel):
        ctx.sentinel = sentinel
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def objects_left_after_i(sequence_parallel: bool) -> None:
    """After I the graph is gone, though its products are there, and so are activations that no product needs."""
    model, store = stage(GPT2, sequence_parallel, torch.float32), WeightGradStore()
    attach_weight_grad_store(model, store)
    block, sentinels = model.layers["1"], []

    def mark(module, args):
        sentinel = Sentinel()
        sentinels.append(weakref.ref(sentinel))
        return MarkGraph.apply(args[0], sentinel), *args[1:]

    for module in (block.attention, block.mlp, block.mlp.down):
        module.register_forward_pre_hook(mark)
    saved: list[weakref.ref] = []

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: torch.Tensor) -> Saved:
        held = Saved(tensor)
        saved.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        each = StagePass(model)
    gc.collect()
    assert len(sentinels) == 3 and all(ref() for ref in sentinels) and any(ref() for ref in saved)
    with store.deferring() as products:
        each.backward()
    del each
    gc.collect()
    assert all(ref() is None for ref in sentinels), "a product keeps the graph behind it alive"
    assert all(ref() is None for ref in saved), "what the graph had saved is still there"
    assert len(products) == 4
    assert not any(t.requires_grad or t.grad_fn for p in products for t in (p.x, p.grad))
    for product in products:
        product.run()


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_after_i_only_the_factors_are_left(tp, sequence_parallel):
    objects_left_after_i(sequence_parallel) if tp == 1 else on_ranks(tp, objects_left_after_i, sequence_parallel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_products_go_where_the_optimizer_reads(dtype):
    """Into the fp32 buffers: as autograd's own gradients do, and summed in fp32 over micro-batches."""
    totals = []
    for keep in (False, True):
        model, store = stage(GPT2, False, dtype), WeightGradStore()
        attach_weight_grad_store(model, store)
        buffers = flat_buffers(model.parameters())
        for number in range(3):
            each = StagePass(model, number)
            if not keep:
                each.backward()
                continue
            with store.deferring() as products:
                each.backward()
            for product in products:
                product.run()
        totals.append([buffer.grads for buffer in buffers])
    assert all(a.dtype is torch.float32 and a.any() and torch.equal(a, b) for a, b in zip(*totals, strict=True))


def test_nothing_is_kept_outside():
    store = WeightGradStore()
    keep = partial(store.put, nn.Parameter(torch.zeros(2, 2)), None, torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="only inside a `deferring` block"):
        keep()
    with pytest.raises(KeyError), store.deferring() as products:
        keep()
        raise KeyError
    assert len(products) == 1 and not store.is_deferring
    with pytest.raises(RuntimeError, match="only inside a `deferring` block"):
        keep()


# Products that add themselves.


def exact_product(total: torch.Tensor, rows: torch.Tensor, x: torch.Tensor) -> None:
    """Add a weight gradient as `add_weight_grad` does: 16-bit factors, summed in fp32."""
    assert total.dtype is torch.float32 and rows.dtype is x.dtype is torch.bfloat16 and rows.dim() == x.dim() == 2
    total.addmm_(rows.t().float(), x.float())


def backward(form: ModelSettings, sequence_parallel: bool, way: str, grad_dtype: torch.dtype = torch.float32):
    """Three micro-batches: gradients in the buffers by parameter, how often each was reported, calls of `add_weight_grad`.

    way: plain, fused, or fused with I and W apart.
    """
    model, store = stage(form, sequence_parallel, torch.bfloat16), WeightGradStore(fused=way != "plain")
    attach_weight_grad_store(model, store)
    buffers = flat_buffers(model.parameters(), grad_dtype=grad_dtype)
    reported: dict[str, int] = {}
    for name, p in model.named_parameters():
        register_grad_ready_hook(p, partial(count, reported, name))
    with mock.patch.object(weight_grad, "add_weight_grad", side_effect=exact_product) as product:
        for number in range(3):
            each = StagePass(model, number)
            if way != "split":
                each.backward()
                continue
            with store.deferring() as products:
                each.backward()
            for kept in products:
                before = sum(reported.values())
                kept.run()
                assert sum(reported.values()) - before == 1 + (kept.bias is not None), "a product is reported when it is made"
    assert len(buffers) and not any(p.grad is not None and p.grad is not p.main_grad for p in model.parameters())
    return {name: p.main_grad.clone() for name, p in model.named_parameters()}, reported, product.call_count


def count(reported: dict[str, int], name: str) -> None:
    reported[name] = reported.get(name, 0) + 1


def compare_fused(form: ModelSettings, sequence_parallel: bool) -> None:
    plain, fused, split = (backward(form, sequence_parallel, way) for way in ("plain", "fused", "split"))
    linear = [name for name in plain[0] if is_linear(name) and name.endswith(".weight")]
    assert plain[2] == 0 and fused[2] == split[2] == 3 * len(linear) > 0
    for _, reported, _ in (plain, fused, split):  # autograd reports a None too, so as often as it likes, but always the same
        assert reported.keys() == plain[0].keys() and all(times % 3 == 0 for times in reported.values())
    assert same_gradients(fused[0], split[0])
    for name, expected in plain[0].items():
        if name in linear:
            error = float((fused[0][name] - expected).abs().max() / expected.abs().max())
            assert 0.0 < error < 2**-7, "the plain way rounds each product to bf16"
        else:
            assert torch.equal(fused[0][name], expected), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_products_that_add_themselves_are_the_same_gradients(tp, sequence_parallel, form):
    on_ranks(tp, compare_fused, FORMS[form], sequence_parallel) if tp > 1 else compare_fused(FORMS[form], sequence_parallel)


def test_no_product_adds_itself_to_a_buffer_of_16_bit():
    plain, fused = (backward(GPT2, False, way, torch.bfloat16) for way in ("plain", "fused"))
    assert fused[2] == 0 and same_gradients(plain[0], fused[0])


def test_fp32_weights_and_layers_without_a_buffer_are_as_before():
    def gradients(dtype: torch.dtype, fused: bool, buffered: bool):
        model, store = stage(GPT2, False, dtype), WeightGradStore(fused=fused)
        attach_weight_grad_store(model, store)
        buffers = flat_buffers(model.parameters()) if buffered else None
        StagePass(model).backward()
        return buffers, named_gradients(model)

    with mock.patch.object(weight_grad, "add_weight_grad", side_effect=AssertionError):
        for dtype, buffered in ((torch.float32, True), (torch.bfloat16, False)):
            assert same_gradients(gradients(dtype, True, buffered)[1], gradients(dtype, False, buffered)[1])


def test_a_cpu_has_no_such_product():
    assert not supports_fused_weight_grad(torch.device("cpu"))


def test_a_device_that_refuses_gets_the_plain_product():
    """As torch does where it takes no fp32 sum beside 16-bit factors; and one that adds nothing is not believed."""
    cuda, zeros, ones = torch.device("cuda"), torch.zeros(16, 16), torch.ones(16, 16, dtype=torch.bfloat16)
    found = []
    for outcome in (exact_product, RuntimeError, TypeError, lambda *_: None):
        with (
            mock.patch.object(weight_grad, "add_weight_grad", side_effect=outcome),
            mock.patch.object(weight_grad.torch, "zeros", return_value=zeros.clone()),
            mock.patch.object(weight_grad.torch, "ones", return_value=ones),
        ):
            found.append(supports_fused_weight_grad(cuda))
    assert found == [True, False, False, False]


def run_fused(setting: Setting, fused: bool):
    """A whole run whose products add themselves where its configuration lets them."""
    can = mock.patch.object(run_module, "supports_fused_weight_grad", return_value=True)
    with can, mock.patch.object(weight_grad, "add_weight_grad", side_effect=exact_product) as product:
        config = setting.config(dist.get_world_size(), 4)
        precision = replace(config.precision, gradient_accumulation_fusion=fused)
        layout = replace(config.layout, overlap_grad_reduce=True, use_distributed_optimizer=True, ddp_bucket_size=3000)
        env = LaunchEnvironment(dist.get_rank(), dist.get_world_size())
        run = run_module.build_run(replace(config, precision=precision, layout=layout), Job(env, torch.device("cpu"), "gloo"))
        curve = train_steps(run, setting, 4)
    return curve, product.call_count, run.optimizer.reducer.started_early, len(run.optimizer.buffers)


@pytest.mark.parametrize("layout", [dict(), dict(tp=2, sequence_parallel=True), dict(pp=2, schedule="zb-h1")], ids=str)
def test_a_run_with_fusion_is_the_run_without_it(layout):
    """To what bf16 rounds; with the reduction of the buckets during the backward passes, which waits for every report."""
    setting = Setting(replace(GPT2, num_layers=4), bf16=True, **layout)
    for fused, plain in zip(on_ranks(2, run_fused, setting, True), on_ranks(2, run_fused, setting, False), strict=True):
        assert plain[1] == 0 and fused[1] > 0 and plain[0] != fused[0]
        assert all(a == pytest.approx(b, rel=0.02) for a, b in zip(fused[0], plain[0], strict=True))
        assert fused[2:] == plain[2:] and fused[2] == (fused[3] if setting.tp == setting.pp == 1 else 0)
