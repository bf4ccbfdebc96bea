"""Sharded optimizer state and overlapped communication are the same run: losses, norms and weights of one process."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from ranks import on_ranks
from reference import GPT2, Setting, accumulate_gradients, start_run, train_steps, trajectory, with_dropout, worst
from torch import Tensor, nn

from megatron.config.schema import MemoryConfig, OptimSettings, RunConfig
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Mesh
from megatron.optim.buffers import flat_buffers
from megatron.optim.optimizer import Optimizer
from megatron.parallel import collectives
from megatron.parallel.spec import ParameterSpec, Part, Shard, describe, param_spec
from megatron.plan.enough_memory import rank_states
from megatron.train.run import Run

STEPS = 8
TOLERANCE = 1e-5
WORD = "embedding.word.weight"
SGD = OptimSettings(optimizer="sgd", lr=0.1, lr_decay_style="constant")
ADAM = OptimSettings(lr=5e-3, clip_grad=1.0, lr_decay_style="cosine", lr_warmup_iters=4)


@dataclass(frozen=True)
class ShardedSetting(Setting):
    """A setting with the options of data-parallel communication; buckets so small that there are many."""

    sharded: bool = False
    overlap_reduce: bool = False
    overlap_gather: bool = False
    bucket: int = 3000

    def config(self, world: int, steps: int) -> RunConfig:
        config = super().config(world, steps)
        layout = replace(
            config.layout,
            use_distributed_optimizer=self.sharded,
            overlap_grad_reduce=self.overlap_reduce,
            overlap_param_gather=self.overlap_gather,
            ddp_bucket_size=self.bucket,
        )
        return replace(config, layout=layout)


TIED = ShardedSetting(replace(with_dropout(GPT2), num_layers=4), masked=True, optim=SGD)
MODELS = {"sgd": TIED, "adam": replace(TIED, optim=ADAM)}
LAYOUTS = {  # world, what differs from one process
    "dp 2": (2, dict(micro_batch=1)),
    "dp 4": (4, dict(micro_batch=1)),
    "tp 2 x dp 2": (4, dict(tp=2)),
    "tp 2 x dp 2, sequence": (4, dict(tp=2, sequence_parallel=True)),
    "pp 2 x dp 2, 1f1b": (4, dict(pp=2, schedule="1f1b")),
    "pp 2 x dp 2, zb-h1": (4, dict(pp=2, schedule="zb-h1")),
    "pp 2 x dp 2, zb-v": (4, dict(pp=2, schedule="zb-v")),
    "cp 2 x dp 2": (4, dict(cp=2)),
    "dp 2, recomputed": (2, dict(memory=MemoryConfig(recompute_granularity="full", recompute_method="uniform"))),
}
MODES = {
    "overlapped reduction": dict(overlap_reduce=True),
    "sharded": dict(sharded=True),
    "sharded, all overlapped": dict(sharded=True, overlap_reduce=True, overlap_gather=True),
}


def setting_for_layout(model: str, layout: str, mode: str) -> tuple[int, ShardedSetting]:
    world, changes = LAYOUTS[layout]
    setting = replace(MODELS[model], **changes, **MODES[mode])
    if setting.cp > 1:  # attention weights are not dropped around the ring
        setting = replace(setting, model=replace(setting.model, attention_dropout=0.0))
    return world, setting


@cache
def one_process(setting: Setting, steps: int = STEPS):
    curve, _, final = trajectory(setting, steps)
    return curve, {name: values for name, (_, values) in final.items()}


def on_one_process(setting: ShardedSetting) -> ShardedSetting:
    """The same run for one process."""
    plain = dict(tp=1, pp=1, cp=1, schedule=None, sequence_parallel=False, micro_batch=1, memory=MemoryConfig())
    return replace(setting, **plain, sharded=False, overlap_reduce=False, overlap_gather=False)


Rectangles = list[tuple[str, tuple[int, ...], tuple[slice, ...], Tensor]]


def rectangles(shards) -> Rectangles:
    found: list[Shard] = list(shards)
    return [(s.name, s.shape, s.part.slices, s.data.detach().clone()) for s in found]


def join_rectangles(ranks: list[Rectangles]) -> dict[str, Tensor]:
    """The whole tensors, from all ranks' rectangles."""
    whole: dict[str, Tensor] = {}
    for held in ranks:
        for name, shape, where, values in held:
            whole.setdefault(name, torch.full(shape, torch.nan))[where] = values
    assert not any(values.isnan().any() for values in whole.values()), "no rank holds a part of a tensor"
    return whole


def model_weights(run: Run) -> dict[str, Tensor]:
    """The weights that the model computes with, by name; of each stage's own."""
    run.optimizer.gatherer.finish()
    return {param_spec(p).name: p.detach().clone() for stage in run.stages.values() for p in stage.parameters()}


def train(setting: ShardedSetting, steps: int):
    run = start_run(setting, steps)
    early, late, curve = [], [], []
    for _ in range(steps):
        pending = len(run.optimizer.gatherer._pending)
        curve += train_steps(run, setting, 1)
        early.append(run.optimizer.reducer.started_early)
        late.append(pending)
    return curve, rectangles(run.weights.shards()), model_weights(run), early, late, len(run.optimizer.buffers)


def difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest, relative to each tensor's largest value."""
    assert got.keys() == expected.keys()
    return max(float((got[n] - e).abs().max() / e.abs().max().clamp(min=1e-3)) for n, e in expected.items())


# SGD goes through all layouts, Adam through those that differ most.
RUNS = [("sgd", layout) for layout in LAYOUTS]
RUNS += [("adam", layout) for layout in ("dp 2", "tp 2 x dp 2, sequence", "pp 2 x dp 2, zb-h1")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("model", "layout"), RUNS)
def test_every_layout_is_the_same_run(model, layout, mode):
    world, setting = setting_for_layout(model, layout, mode)
    expected, final = one_process(on_one_process(setting))
    results = on_ranks(world, train, setting, STEPS)
    for curve, _, own, _, _, _ in results:
        assert worst(curve, expected) < TOLERANCE
        for name, values in own.items():  # every rank computes with the new weights, not with its slice of them alone
            if values.shape == final[name].shape:
                assert float((values - final[name]).abs().max()) < (1e-5 if model == "sgd" else 1e-3)
    tolerance = TOLERANCE if model == "sgd" else 1e-2  # Adam divides noise by noise where a gradient is nothing else
    assert difference(join_rectangles([held for _, held, *_ in results]), final) < tolerance


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "cp 2 x dp 2"])
@pytest.mark.parametrize("sharded", [False, True])
def test_overlap_changes_no_bit(layout, sharded):
    """The same collectives, at other times: from the second step on before the last backward pass has ended."""
    world, setting = setting_for_layout("adam", layout, "sharded" if sharded else "overlapped reduction")
    at_once = replace(setting, overlap_reduce=False, overlap_gather=False)
    during = replace(setting, overlap_reduce=True, overlap_gather=sharded)
    for plain, overlapping in zip(on_ranks(world, train, at_once, 4), on_ranks(world, train, during, 4), strict=True):
        assert plain[0] == overlapping[0]
        for (name, _, where, values), (other, _, there, same) in zip(plain[1], overlapping[1], strict=True):
            assert name == other and where == there and torch.equal(values, same), name
        assert all(torch.equal(values, overlapping[2][name]) for name, values in plain[2].items())
        buckets = overlapping[5]
        assert buckets > 4 and plain[3] == [0] * 4 and plain[4] == [0] * 4
        assert overlapping[3] == [0, *[buckets] * 3], "every bucket starts before the last backward pass has ended"
        assert overlapping[4] == ([0, *[buckets] * 3] if sharded else [0] * 4)


def buckets_under_way(setting: ShardedSetting):
    """List for each call in the second step the buckets under way, and whether any of them has a parameter that it needs."""
    run = start_run(setting, 2)
    train_steps(run, setting, 1)
    gatherer, seen = run.optimizer.gatherer, []

    def look(name: str, parameters) -> None:
        own = {id(p) for p in parameters}
        needed = {n for n, b in enumerate(gatherer.buffers) if any(id(p) in own for p in b.parameters)}
        seen.append((name, len(gatherer._pending), bool(needed & set(gatherer._pending))))

    for stage in run.stages.values():
        for name, module in stage.named_modules():
            module.register_forward_pre_hook(lambda module, _, name=name: look(name, module.parameters()))
        loss = stage.loss
        stage.loss = lambda x, batch, stage=stage, loss=loss: (look("loss", stage.parameters()), loss(x, batch))[1]
    train_steps(run, setting, 1)
    return seen


@pytest.mark.parametrize("layout", ["dp 2", "pp 2 x dp 2, zb-h1"])
def test_nothing_computes_with_weights_that_are_under_way(layout):
    world, setting = setting_for_layout("sgd", layout, "sharded, all overlapped")
    for seen in on_ranks(world, buckets_under_way, setting):
        assert not [name for name, _, needed in seen if needed]
        under_way = [pending for _, pending, _ in seen]
        assert under_way[0] > 0 and under_way[-1] == 0 and under_way == sorted(under_way, reverse=True)


def first_norm(setting: ShardedSetting, fault: float):
    """The first step's norm; one rank's gradients multiplied with `fault`."""
    run = start_run(setting, 1)
    accumulate_gradients(run, setting)
    if run.mesh.world.last:
        for buffer in run.optimizer.buffers:
            buffer.grads.mul_(fault)
    return run.optimizer.step(lr=1e-2, weight_decay=0.0, scale=1.0).grad_norm


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        dict(tp=2, pp=2, sequence_parallel=True, schedule="1f1b"),
        dict(tp=2, sequence_parallel=True),
        dict(pp=2, schedule="zb-h1"),
        dict(),
    ],
    ids=str,
)
def test_the_norm_counts_every_element_once(changes, sharded):
    setting = replace(TIED, masked=False, **changes, sharded=sharded)
    norm = first_norm(on_one_process(setting), 1.0)
    for right in on_ranks(4, first_norm, setting, 1.0):
        assert abs(right - norm) / norm < 1e-6
    for wrong in on_ranks(4, first_norm, setting, 1.01):
        assert abs(wrong - norm) / norm > 1e-4


def train_to_the_bit(setting: ShardedSetting, steps: int):
    run = start_run(setting, steps)
    curve = train_steps(run, setting, steps)
    return [loss for loss, _ in curve], model_weights(run), rectangles(run.weights.shards())


@pytest.mark.parametrize("bf16", [False, True])
def test_slices_hold_the_bits_of_the_whole(bf16):
    """A sum of two is the same in any order; without clipping, which takes the norm, nothing else can differ."""
    setting = replace(MODELS["adam"], bf16=bf16, optim=replace(ADAM, clip_grad=0.0))
    whole = on_ranks(2, train_to_the_bit, setting, 4)
    sliced = on_ranks(2, train_to_the_bit, replace(setting, sharded=True, overlap_gather=True), 4)
    for a, b in zip(whole, sliced, strict=True):
        assert a[0] == b[0] and all(torch.equal(values, b[1][name]) for name, values in a[1].items())
    expected, got = join_rectangles([whole[0][2]]), join_rectangles([held for *_, held in sliced])
    assert all(torch.equal(values, got[name]) for name, values in expected.items())


def by_reduce_scatter(setting: ShardedSetting, steps: int):
    """The way of other backends than gloo."""
    other = SimpleNamespace(**{**vars(collectives.dist), "get_backend": lambda group=None: "nccl"})
    with mock.patch.object(collectives, "dist", other):
        return train_to_the_bit(setting, steps)


def test_reduce_scatter_in_place_gives_the_same_sums():
    setting = replace(MODELS["adam"], sharded=True, overlap_reduce=True)
    for a, b in zip(on_ranks(2, train_to_the_bit, setting, 4), on_ranks(2, by_reduce_scatter, setting, 4), strict=True):
        assert a[0] == b[0] and all(torch.equal(values, b[1][name]) for name, values in a[1].items())


def tied_copies(setting: ShardedSetting, steps: int):
    run = start_run(setting, steps)
    train_steps(run, setting, steps)
    return model_weights(run)[WORD]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("bucket", [3000, 1_000_000])
def test_tied_copies_stay_equal_with_three_data_parallel_ranks(bucket, sharded):
    """Sums of three depend on their order, and the two stages' other parameters differ."""
    setting = replace(MODELS["adam"], pp=2, global_batch=6, sharded=sharded, overlap_reduce=True, bucket=bucket)
    copies = on_ranks(6, tied_copies, setting, 3)
    assert all(torch.equal(copy, copies[0]) for copy in copies)


def held_bytes(setting: ShardedSetting) -> tuple[int, int, int, int]:
    """Bytes of the storages that this rank really has; and its pipeline rank."""
    run = start_run(setting, 1)
    train_steps(run, setting, 1)
    buffers = run.optimizer.buffers
    weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for b in buffers for t in (b.weights, b.main)}
    moments = [t for n in range(len(buffers)) for t in run.optimizer.update.state(n).values()]
    kept = sum(t.untyped_storage().nbytes() for t in moments)
    return sum(weights.values()), sum(b.grads.nbytes for b in buffers), kept, run.mesh.pp.rank


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("layout", ["dp 4", "tp 2 x dp 2, sequence", "pp 2 x dp 2, 1f1b"])
def test_bytes_are_those_of_the_formula(layout, sharded, bf16):
    world, setting = setting_for_layout("adam", layout, "sharded" if sharded else "overlapped reduction")
    setting = replace(setting, bf16=bf16)
    config = setting.config(world, 1)
    grid, dp = Grid.from_layout(config.layout, world), world // (setting.tp * setting.pp)
    for weights, gradients, moments, pp_rank in on_ranks(world, held_bytes, setting):
        (memory,) = rank_states(config, grid, [grid.rank(pp=pp_rank)])
        assert (weights, gradients, moments) == (memory.weights, memory.gradients, memory.optimizer)
        elements = gradients // 4
        assert moments == 8 * elements // (dp if sharded else 1)
        assert weights == (2 * elements + 4 * elements // (dp if sharded else 1) if bf16 else 4 * elements)


# Without a model: what the optimizer does with one parameter of each kind.


def parameter(name: str, values: list[float], **kind: object) -> nn.Parameter:
    shape = (len(values),)
    return describe(nn.Parameter(torch.tensor(values)), ParameterSpec(name, shape, Part.whole(shape), **kind))  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
def test_groups_have_their_own_rates_and_decay(kernel):
    values = [1.0, -2.0, 3.0]
    cases = {"plain": {}, "bias": {"decay": False}}
    cases |= {f"decoupled {name}": {"decoupled": True, **kind} for name, kind in cases.items()}
    parameters = [parameter(name, values, **kind) for name, kind in cases.items()]
    buffers = flat_buffers(parameters)
    optimizer = Optimizer(buffers, OptimSettings(clip_grad=0.0, adam_kernel=kernel), Mesh.single())
    assert len(buffers) == 4
    for each in parameters:
        each.main_grad.copy_(torch.tensor([0.5, 0.0, -1.0]))
    report = optimizer.step(lr=0.1, weight_decay=0.2, scale=1.0, decoupled_lr=0.3)
    assert report.grad_norm == pytest.approx((4 * 1.25) ** 0.5)
    for each, (name, kind) in zip(parameters, cases.items(), strict=True):
        lr, decay = 0.3 if kind.get("decoupled") else 0.1, 0.2 if kind.get("decay", True) else 0.0
        moved = [v - lr * decay * v - lr * sign for v, sign in zip(values, (1.0, 0.0, -1.0), strict=True)]
        assert each.tolist() == pytest.approx(moved, rel=1e-5), name


@pytest.mark.parametrize("kind", [{"adam_kernel": "fused"}, {"adam_kernel": "foreach"}, {"optimizer": "sgd"}], ids=str)
def test_scale_and_clipping_are_one_factor_of_the_update(kind):
    """A gradient of norm 5, halved, and cut to 1; nothing of it is left for the next step, which needs no factor."""
    weights = parameter("weights", [1.0, 1.0, 1.0])
    config = OptimSettings(clip_grad=1.0, sgd_momentum=1e-9, adam_beta1=0.0, **kind)
    optimizer = Optimizer(flat_buffers([weights]), config, Mesh.single())
    for grads, scale, norm, factor in (([3.0, 0.0, -4.0], 0.5, 2.5, 0.2), ([0.3, 0.0, 0.4], 1.0, 0.5, 1.0)):
        weights.main_grad.copy_(torch.tensor(grads))
        report = optimizer.step(lr=0.1, weight_decay=0.0, scale=scale)
        (first, *_) = optimizer.update.state(0).values()
        assert report.grad_norm == pytest.approx(norm)
        assert first[:3].tolist() == pytest.approx([g * factor for g in grads], rel=1e-5)


def test_zeros_and_the_norm_of_the_parameters():
    weights = parameter("weights", [3.0, 0.0, 4.0])
    config = OptimSettings(clip_grad=0.0)
    optimizer = Optimizer(flat_buffers([weights]), config, Mesh.single(), log_zeros=True, log_params_norm=True)
    weights.main_grad.copy_(torch.tensor([1.0, 0.0, 0.0]))
    report = optimizer.step(lr=0.0, weight_decay=0.0, scale=2.0)
    assert (report.grad_norm, report.zeros, report.params_norm) == (2.0, 2, 5.0)


def test_apex_counts_steps_once_a_group(monkeypatch):
    """A stand-in with the state and groups of apex's FusedAdam: what a checkpoint reads and fills."""

    class FusedAdam(torch.optim.Optimizer):
        def __init__(self, groups, lr, betas, eps, adam_w_mode):
            assert adam_w_mode, "the decay is decoupled"
            super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

        def step(self):
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for p in group["params"]:
                    assert set(self.state[p]) == {"exp_avg", "exp_avg_sq"}
                    p.data -= group["lr"] * p.grad

    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", ModuleType("apex.optimizers"))
    sys.modules["apex.optimizers"].FusedAdam = FusedAdam
    weights = parameter("weights", [1.0])
    optimizer = Optimizer(flat_buffers([weights]), OptimSettings(clip_grad=0.0, adam_kernel="apex"), Mesh.single())
    assert optimizer.scalars()["step"] == 0
    optimizer.load_scalars({"step": 5})
    weights.main_grad.fill_(2.0)
    optimizer.step(lr=0.25, weight_decay=0.0, scale=1.0)
    assert optimizer.scalars()["step"] == 6 and weights.item() == 0.5
    assert [s.name for s in optimizer.shards()] == ["exp_avg.weights", "exp_avg_sq.weights"]
