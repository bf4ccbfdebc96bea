"""A layer's own figures are in the sizes of a run: layers that the package does not know are counted like its own."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from types import MappingProxyType
from unittest.mock import patch

import pytest
from reference import GPT2
from torch import Tensor, nn

from megatron.config import normalizations
from megatron.config.resolve import resolve, resolve_model
from megatron.config.schema import BatchConfig, DataConfig, LayoutSettings, ModelConfig, OptimSettings, RunConfig, RunSettings
from megatron.contract import StagePart
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Axis
from megatron.model import build
from megatron.model.attention import CoreAttention
from megatron.model.block import Block
from megatron.model.build import build_stages
from megatron.model.gpt import GPT
from megatron.model.norm import LayerNorm
from megatron.optim.buffers import flat_buffers
from megatron.parallel.buckets import buckets
from megatron.parallel.cost import ActivationBytes, MicroBatchShape
from megatron.parallel.linear import ColumnLinear
from megatron.parallel.spec import param_spec
from megatron.parallel.tensor_parallel import TensorParallel
from megatron.plan.enough_memory import rank_states
from megatron.plan.flops import flops_per_token, stage_flops
from megatron.plan.memory import StageActivations
from megatron.plan.size import MetaModel
from megatron.plan.stages import plan_stages
from megatron.plan.tables import report_plan

LAYERS, HIDDEN = 4, 32
PLAIN = replace(GPT2, num_layers=LAYERS)


class ToyNorm(LayerNorm):
    """A layer norm with one parameter more."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__(config, tp)
        self.power = tp.parameter(self.hidden, init="ones", decay=False)

    def activation_bytes(self, shape: MicroBatchShape) -> ActivationBytes:
        return super().activation_bytes(shape) + ActivationBytes(saved=shape.hidden_bytes)  # what is multiplied

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.power


class ToyBlock(Block):
    """A layer with a matrix more, cut over the ranks."""

    def __init__(
        self, config: ModelConfig, number: int, tp: TensorParallel, core_attention: CoreAttention, *, seed: int
    ) -> None:
        super().__init__(config, number, tp, core_attention, seed=seed)
        self.extra = ColumnLinear(HIDDEN, 2 * HIDDEN, tp, bias=False)


class ToyGPT(GPT):
    """A GPT whose odd layers are of another kind."""

    @staticmethod
    def layer_kind(config: ModelConfig, number: int) -> Hashable:
        return number % 2

    def build_layer(self, number: int, core_attention: CoreAttention) -> Block:
        kind = ToyBlock if number % 2 else Block
        return kind(self.config, number, self.tp, core_attention, seed=self.seed)


def plain_model() -> MetaModel:
    return MetaModel(resolve_model(PLAIN))


@pytest.fixture(params=["norm", "layers"])
def toy(request: pytest.FixtureRequest) -> Iterator[tuple[ModelConfig, int]]:
    """A toy model of the kind, and how many parameters it has: so many more than GPT-2."""
    plain = plain_model().count()
    model = replace(PLAIN, normalization="toy" if request.param == "norm" else "LayerNorm")
    kinds = {**normalizations.NORMALIZATIONS, "toy": EntryPoint("toy", "test_sizes:ToyNorm", normalizations.GROUP)}
    models = {**build.MODELS, "gpt": ToyGPT if request.param == "layers" else GPT}
    more = (2 * LAYERS + 1) * HIDDEN if request.param == "norm" else LAYERS // 2 * 2 * HIDDEN**2
    with (
        patch.object(normalizations, "NORMALIZATIONS", MappingProxyType(kinds)),
        patch.object(build, "MODELS", MappingProxyType(models)),
    ):
        yield model, plain + more


def build_config(model: ModelConfig, tp: int, pp: int) -> RunConfig:
    layout = LayoutSettings(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, pipeline_stage_layers=(3, 1)[: 2 * pp - 2]
    )
    batch = BatchConfig(micro_batch_size=1, global_batch_size=4, train_iters=1)
    return resolve(RunSettings(model=model, layout=layout, data=DataConfig(seq_length=16), batch=batch), tp * pp)


def counted_parameters(config: RunConfig, world: int) -> int:
    """The parameters that a dry run shows."""
    (line,) = (line for line in report_plan(config, world, "", ()) if line.startswith("# Parameters: "))
    return int(line.split()[2].replace(",", ""))


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_what_the_package_does_not_know_is_counted(toy: tuple[ModelConfig, int], tp: int, pp: int) -> None:
    model, parameters = toy
    config, world = build_config(model, tp, pp), tp * pp
    assert counted_parameters(config, world) == parameters
    plan, axis = plan_stages(config), Axis("tp", tp, 0, tuple(range(tp)))
    grid = Grid.from_layout(config.layout, world)
    for rank in range(pp):
        stages = build_stages(config.model, plan.placement, plan.parts, TensorParallel(axis), rank)
        buffers = flat_buffers(nn.ModuleList(stages.values()).parameters())
        (state,) = rank_states(config, grid, [grid.rank(pp=rank)])
        assert state.gradients == sum(buffer.grads.nbytes for buffer in buffers)


def test_what_a_layer_computes_it_says_itself() -> None:
    """A matrix more in two of four layers: its product forward, and one for each gradient. The plan finds and weighs them."""
    seq, each = 16, 2 * 2 * HIDDEN**2
    expected = flops_per_token(plain_model(), seq) + 3 * 2 * each
    with patch.object(build, "MODELS", MappingProxyType({**build.MODELS, "gpt": ToyGPT})):
        model = plain_model()
        assert flops_per_token(model, seq) == expected
        even, odd = (stage_flops(model, seq, StagePart(range(n, n + 1), False, False)) for n in (2, 3))
        assert (odd.forward - even.forward, odd.backward - even.backward, odd.weight - even.weight) == (each, each, each)


def test_what_a_layer_keeps_it_says_itself(toy: tuple[ModelConfig, int]) -> None:
    """In hidden states of a micro-batch, of which a plain layer keeps 16 and its weight gradients take as many.

    Of two layers each toy norm keeps one more, or one layer the input of one matrix more, whose gradient takes that and its
    wide output.
    """
    run = build_config(toy[0], 1, 1)
    found = StageActivations.from_config(run, MetaModel.from_config(run), StagePart(range(1, 3), False, False)).micro_batch
    saved, weight_grad = (4, 0) if toy[0].normalization == "toy" else (1, 3)
    hidden = 4 * 16 * HIDDEN
    assert (found.saved, found.weight_grad) == ((32 + saved) * hidden, (32 + weight_grad) * hidden)


def test_a_rate_of_its_own_is_a_bucket_of_its_own() -> None:
    """Under --decoupled-lr the embedding's bucket is padded by itself until the ranks can share it."""
    world = 8
    batch = BatchConfig(micro_batch_size=1, global_batch_size=world, train_iters=1)
    layout = LayoutSettings(use_distributed_optimizer=True)
    run = RunSettings(
        model=replace(PLAIN, hidden_size=34, num_attention_heads=2), layout=layout, data=DataConfig(seq_length=16), batch=batch
    )
    counted = []
    for optim in (OptimSettings(), OptimSettings(decoupled_lr=1e-3)):
        config = resolve(replace(run, optim=optim), world)
        model = build.model_class(config.model)(config.model, StagePart(range(LAYERS)), TensorParallel.alone())
        specs = [param_spec(p) if optim.decoupled_lr is None else param_spec(p).with_own_rate() for p in model.parameters()]
        real = buckets([p.numel() for p in model.parameters()], [s.bucket_kind for s in specs], None, world)
        (state,) = rank_states(config, Grid.from_layout(config.layout, world), [0])
        assert state.gradients == 4 * sum(bucket.length for bucket in real)
        counted.append(state.gradients)
    assert counted[0] < counted[1]
