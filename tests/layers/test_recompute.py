"""Recomputation on one stage: what is run again, the same gradients, and the memory beside arXiv 2205.05198's formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from reference import GPT2, LLAMA

from megatron.config.resolve import resolve_model
from megatron.config.schema import MemoryConfig, ModelSettings
from megatron.contract import Batch, StagePart
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Axis, Mesh
from megatron.model.attention import causal_attention
from megatron.model.gpt import GPT
from megatron.model.init import initialize
from megatron.parallel.cost import MicroBatchShape, module_activation_bytes
from megatron.parallel.recompute import Recompute
from megatron.parallel.tensor_parallel import TensorParallel
from megatron.plan.size import MetaModel

LAYERS = 5
KINDS = {
    "none": MemoryConfig(),
    "selective": MemoryConfig("selective"),
    "uniform 1": MemoryConfig("full", "uniform"),
    "uniform 2": MemoryConfig("full", "uniform", 2),
    "uniform 9": MemoryConfig("full", "uniform", 9),
    "block 2": MemoryConfig("full", "block", 2),
    "block 9": MemoryConfig("full", "block", 9),
    "uniform 2, distributed": MemoryConfig("full", "uniform", 2, distribute_saved_activations=True),
    "block 2, distributed": MemoryConfig("full", "block", 2, distribute_saved_activations=True),
}


def tp_axis() -> Axis:
    return Mesh.build(Grid(tp=dist.get_world_size()), dist.get_rank()).tp if dist.is_initialized() else Axis.alone("tp")


class SmallStage:
    """Five layers between others, and one micro-batch of two samples."""

    def __init__(
        self,
        form: ModelSettings,
        kind: MemoryConfig,
        *,
        seq: int = 16,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        draws: bool = False,
    ) -> None:
        config = resolve_model(replace(form, num_layers=LAYERS + 2, max_position_embeddings=seq))
        tp, self.attended = tp_axis(), 0
        recompute = Recompute.from_config(kind, tp, draws=draws)
        part = StagePart(range(1, 1 + LAYERS), False, False)
        self.config, self.tp = config, tp
        self.model = GPT(
            config,
            part,
            TensorParallel(tp, sequence_parallel),
            seed=3,
            core_attention=self.core_attention,
            recompute=recompute,
            dtype=dtype,
        )
        initialize(self.model, config, 3)
        self.calls: list[int] = []
        for i, block in enumerate(self.model.layers.values()):
            block.input_norm.register_forward_hook(lambda *_, i=i: self.calls.append(i))
        tokens = torch.zeros(2, seq, dtype=torch.int64)
        places = torch.arange(seq).expand(2, seq)
        self.batch = Batch(tokens, tokens, torch.ones(2, seq), places, torch.arange(2))
        own = tp.rank if self.model.tp.sequence_parallel else 0
        generator = torch.Generator().manual_seed(own)
        self.x = torch.randn(self.model.hidden_shape(self.batch), generator=generator).to(dtype).requires_grad_()

    def core_attention(self, *args):
        self.attended += 1
        return causal_attention(*args)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients of the weights and of the input, after one forward and backward pass."""
        self.model.hidden(self.x, self.batch).square().sum().backward()
        return {"x": self.x.grad, **{name: p.grad for name, p in self.model.named_parameters()}}


def dropping(form: ModelSettings, *, fused: bool = False) -> ModelSettings:
    return replace(form, hidden_dropout=0.1, attention_dropout=0.1, fused_attention_dropout=fused)


# What is run again.

ONCE = list(range(LAYERS))
AGAIN = {  # the layers that run, forward and then backward
    "none": [],
    "selective": [],
    "uniform 1": [4, 3, 2, 1, 0],
    "uniform 2": [4, 2, 3, 0, 1],
    "uniform 9": [0, 1, 2, 3, 4],
    "block 2": [1, 0],
    "block 9": [4, 3, 2, 1, 0],
}


@pytest.mark.parametrize("kind", AGAIN)
def test_recomputation_runs_the_chosen_layers_again(kind):
    stage = SmallStage(dropping(GPT2), KINDS[kind])
    y = stage.model.hidden(stage.x, stage.batch)
    assert stage.calls == ONCE and stage.attended == LAYERS
    y.sum().backward()
    assert stage.calls == ONCE + AGAIN[kind]
    assert stage.attended == LAYERS + (LAYERS if kind == "selective" else len(AGAIN[kind]))


@pytest.mark.parametrize("kind", AGAIN)
def test_nothing_is_run_again_without_gradients(kind):
    stage = SmallStage(GPT2, KINDS[kind])
    with torch.no_grad():
        y = stage.model.eval().hidden(stage.x, stage.batch)
    assert stage.calls == ONCE and stage.attended == LAYERS and y.grad_fn is None


# The same gradients, to the last bit.

FORMS = {"gpt2": GPT2, "gpt2 dropping": dropping(GPT2), "llama dropping": dropping(LLAMA)}


def same_gradients(form: ModelSettings, kinds: list[str], dtype: torch.dtype = torch.float32, sequence_parallel: bool = False):
    """The names of the kinds that give other gradients than none."""
    expected = SmallStage(form, MemoryConfig(), dtype=dtype, sequence_parallel=sequence_parallel).gradients()
    wrong = []
    for kind in kinds:
        found = SmallStage(form, KINDS[kind], dtype=dtype, sequence_parallel=sequence_parallel).gradients()
        if any(not torch.equal(found[name], expected[name]) for name in expected):
            wrong.append(kind)
    return wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_without(form, dtype):
    assert same_gradients(FORMS[form], list(AGAIN), dtype) == []


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_gradients_are_those_without_on_two_ranks(sequence_parallel):
    kinds = list(AGAIN if sequence_parallel else KINDS)
    assert on_ranks(2, same_gradients, FORMS["llama dropping"], kinds, torch.float32, sequence_parallel) == [[], []]


@pytest.mark.parametrize("kind", ["selective", "uniform 2", "block 2"])
def test_a_kernel_that_draws_for_itself_draws_the_same_again(kind):
    """And would not if its generator were left alone."""

    def gradients(kind: str, draws: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(1)
        grad = SmallStage(dropping(GPT2, fused=True), KINDS[kind], draws=draws).gradients()["x"]
        return grad, torch.rand(4)

    expected, after = gradients("none", True)
    found, then = gradients(kind, True)
    assert torch.equal(found, expected) and torch.equal(then, after)
    assert not torch.equal(gradients(kind, False)[0], expected)


# Memory.

WIDE = replace(GPT2, hidden_size=256, num_attention_heads=8)
SEQ = 128


def kept_bytes(
    form: ModelSettings, kind: str, *, bf16: bool = False, sequence_parallel: bool = False, work: bool = False
) -> int:
    """Count the bytes that autograd keeps between a stage's forward and backward: distinct storages, without the weights."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    stage = SmallStage(form, KINDS[kind], seq=SEQ, sequence_parallel=sequence_parallel, dtype=dtype)
    own = {t.untyped_storage().data_ptr() for t in (*stage.model.parameters(), *stage.model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        stage.model.hidden(stage.x, stage.batch)
    return sum(storage.nbytes() for storage in kept.values())


def published_bytes(form: ModelSettings, kind: str, *, bf16: bool, tp: int = 1, sequence_parallel: bool = False) -> float:
    """Bytes of the five layers by 2205.05198, with e bytes an element: 2 in its equations, which add up to these."""
    e, h, a = 2 if bf16 else 4, form.hidden_size, form.num_attention_heads
    masks = 2 if form.hidden_dropout else 0
    whole, cut = (4 * e + masks) * h, 12 * e * h / tp  # 10 and 24 / t
    square = (2 * e + 1) * a * SEQ / tp if form.attention_dropout else 0  # 5 a s / t
    if sequence_parallel:
        whole /= tp
    full = e * h / (tp if sequence_parallel else 1)
    layers = {
        "none": LAYERS * (whole + cut + square),
        "selective": LAYERS * (whole + cut),
        "uniform 1": LAYERS * full,
        "uniform 2": 3 * full,
        "block 2": 2 * full + 3 * (whole + cut + square),
        "uniform 2, distributed": 3 * full / tp,
    }
    return SEQ * 2 * layers[kind]


COUNTED = ("none", "selective", "uniform 1", "uniform 2", "block 2")


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", COUNTED)
def test_memory_is_the_published(kind, bf16):
    measured = kept_bytes(dropping(WIDE), kind, bf16=bf16)
    assert measured == pytest.approx(published_bytes(dropping(WIDE), kind, bf16=bf16), rel=0.01)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("kind", [*COUNTED, "uniform 2, distributed"])
def test_memory_is_the_published_on_two_ranks(kind, sequence_parallel):
    if sequence_parallel and "distributed" in kind:
        return
    found = on_ranks(2, kept_on_rank, kind, sequence_parallel)
    expected = published_bytes(dropping(WIDE), kind, bf16=True, tp=2, sequence_parallel=sequence_parallel)
    assert found == [pytest.approx(expected, rel=0.01)] * 2


def kept_on_rank(kind: str, sequence_parallel: bool) -> int:
    return kept_bytes(dropping(WIDE), kind, bf16=True, sequence_parallel=sequence_parallel)


def test_fused_attention_keeps_less_than_the_published():
    """Without dropout of the weights torch's kernel keeps no square: what the formula counts for selective."""
    form = replace(WIDE, hidden_dropout=0.1)
    assert kept_bytes(form, "none") == pytest.approx(published_bytes(form, "selective", bf16=False), rel=0.01)
    assert kept_bytes(form, "none") < 0.7 * published_bytes(dropping(form), "none", bf16=False)


GATED = replace(LLAMA, hidden_size=256, num_attention_heads=8, normalization="LayerNorm", attention_dropout=0.1)
BEYOND = {  # what the paper does not count, as the modules do
    "rotary, grouped queries, gate": GATED,
    "grouped queries alone": replace(dropping(WIDE), num_query_groups=2),
    "rotary alone": replace(dropping(WIDE), position_embedding_type="rope"),
    "exact gelu": replace(WIDE, activation="gelu-exact"),
    "squared relu": replace(WIDE, activation="squared-relu"),
}


@pytest.mark.parametrize("kind", ["none", "selective"])
@pytest.mark.parametrize("form", BEYOND)
def test_memory_beyond_the_published(form, kind):
    config = resolve_model(BEYOND[form])
    layer = MetaModel(config).layer(0)
    each = module_activation_bytes(layer, MicroBatchShape(rows=2, seq=SEQ, hidden=256, element=4))
    expected = LAYERS * (each.saved - (each.core if kind == "selective" else 0))
    # Angles are kept once for all layers: [seq, batch, 1, head] cosines and sines.
    angles = 2 * SEQ * 2 * 32 * 4 if BEYOND[form].position_embedding_type == "rope" else 0
    assert kept_bytes(BEYOND[form], kind) == pytest.approx(expected + angles, rel=0.01)


def test_rmsnorm_on_a_cpu_keeps_two_tensors_more():
    """Its parts are differentiated one by one, and each norm keeps the normed input; fused kernels make it from the sum."""
    more = kept_bytes(replace(WIDE, normalization="RMSNorm"), "none") - kept_bytes(WIDE, "none")
    assert more == pytest.approx(LAYERS * SEQ * 2 * 2 * 256 * 4, rel=0.02)
