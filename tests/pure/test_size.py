"""Sizes: equal to a real build, and to sums done by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config.presets import PRESETS
from megatron.config.resolve import resolve, resolve_model
from megatron.config.schema import (
    BatchSettings,
    DataSettings,
    LayoutSettings,
    MemoryConfig,
    ModelConfig,
    ModelSettings,
    OptimSettings,
    PrecisionConfig,
    RunConfig,
    RunSettings,
)
from megatron.contract import StagePart
from megatron.mesh.mesh import Axis
from megatron.model.build import MODELS
from megatron.optim import buffers
from megatron.parallel import cross_entropy
from megatron.parallel.cross_entropy import CHUNK, MIN_ROWS, fused_linear_cross_entropy_bytes
from megatron.parallel.embedding import VocabShard, padded_vocab_size
from megatron.parallel.spec import param_spec
from megatron.parallel.tensor_parallel import TensorParallel
from megatron.pipeline.schedules.schedule import Action, Op, Schedule
from megatron.plan.flops import (
    causal_flops_per_token,
    flops_per_token,
    head_flops,
    layer_flops,
    stage_flops,
)
from megatron.plan.memory import Memory, StageActivations, peak_memory
from megatron.plan.size import MetaModel
from megatron.plan.stages import StagePlan

VOCAB = 127
PLAIN = ModelSettings(
    num_layers=3, hidden_size=24, num_attention_heads=4, max_position_embeddings=10, make_vocab_size_divisible_by=8
)
FORMS = {
    "gpt2": PLAIN,
    "llama": replace(
        PLAIN,
        position_embedding_type="rope",
        normalization="RMSNorm",
        activation="swiglu",
        add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
        num_query_groups=2,
    ),
    "no norm bias": replace(PLAIN, add_norm_bias=False, kv_channels=10, ffn_hidden_size=40, position_embedding_type="none"),
    "swiglu with biases": replace(PLAIN, activation="swiglu", untie_embeddings_and_output_weights=True),
    "bert": replace(PLAIN, architecture="bert"),
    "bert without binary head": replace(PLAIN, architecture="bert", bert_binary_head=False, add_bias_linear=False),
}


def run_config(
    model: ModelConfig,
    *,
    tp: int = 1,
    seq: int = 8,
    rows: int = 1,
    bf16: bool = True,
    sequence_parallel: bool = False,
    memory: MemoryConfig | None = None,
    optimizer: str = "adam",
) -> RunConfig:
    settings = RunSettings(
        model=model,
        layout=LayoutSettings(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel),
        data=DataSettings(seq_length=seq),
        batch=BatchSettings(micro_batch_size=rows),
        optim=OptimSettings(optimizer=optimizer),
        precision=PrecisionConfig(bf16=bf16),
        memory=memory or MemoryConfig(),
    )
    return resolve(settings, tp)


def count_activations(model: ModelConfig, part: StagePart, **options: Any) -> StageActivations:
    run = run_config(model, **options)
    return StageActivations.from_config(run, MetaModel.from_config(run), part)


def activation_bytes(model: ModelConfig, part: StagePart, in_flight: int = 1, **options: Any) -> int:
    """A stage's activations at their fullest, all together."""
    found = count_activations(model, part, **options)
    return found.held(in_flight, 0) + (found.transient if in_flight else 0)


def memory_on_a_rank(
    model: ModelConfig,
    *parts: StagePart,
    in_flight: Sequence[int] = (),
    **options: Any,
) -> Memory:
    """Return the memory of a rank with these stages, by default the whole model."""
    run = run_config(model, **options)
    parts = parts or (StagePart(range(model.num_layers)),)
    plan = StagePlan((0,) * len(parts), parts, len(parts))
    forward = [Action(Op.F, stage, i) for stage, count in enumerate(in_flight or [1] * len(parts)) for i in range(count)]
    return peak_memory(run, MetaModel.from_config(run), plan, Schedule("test", 1, plan.placement, (tuple(forward),)), 0)


def resolve_with_vocab(model: ModelSettings) -> ModelConfig:
    return replace(resolve_model(model), vocab_size=VOCAB)


STAGES = [
    (form, part)
    for form in FORMS
    for part in (
        StagePart(range(3), True, True),
        StagePart(range(1), True, False),
        StagePart(range(1, 2), False, False),
        StagePart(range(2, 3), False, True),
        StagePart(range(3, 3), False, True),
    )
]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("form", "part"), STAGES)
def test_parameters_are_those_of_a_real_build(form: str, part: StagePart, tp: int) -> None:
    model = resolve_with_vocab(FORMS[form])
    last = TensorParallel(Axis("tp", tp, tp - 1, tuple(range(tp))))
    built = MODELS[model.architecture](model, part, last, dtype=torch.float32)
    real = [(param_spec(p).name, param_spec(p).shape, p.numel()) for p in built.parameters()]
    sizes = MetaModel(model, tp)
    listed = list(sizes.parameters(part))
    assert [(p.spec.name, p.spec.shape, p.local) for p in listed] == real
    assert sizes.count(part) == sum(torch.Size(shape).numel() for _, shape, _ in real)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bf16", [False, True])
def test_bytes_are_those_of_real_buffers(form: str, bf16: bool) -> None:
    model = resolve_with_vocab(FORMS[form])
    dtype = torch.bfloat16 if bf16 else torch.float32
    first = TensorParallel(Axis("tp", 2, 0, (0, 1)))
    built = MODELS[model.architecture](model, StagePart(range(3), True, True), first, dtype=dtype)
    flat = buffers.flat_buffers(built.parameters())
    memory = memory_on_a_rank(model, tp=2, bf16=bf16)
    held = {t.data_ptr(): t.nbytes for buffer in flat for t in (buffer.weights, buffer.main)}
    assert memory.weights == sum(held.values())
    assert memory.gradients == sum(buffer.grads.nbytes for buffer in flat)
    assert memory.optimizer == 2 * sum(buffer.grads.nbytes for buffer in flat)  # two moments in fp32
    sgd = memory_on_a_rank(model, tp=2, bf16=bf16, optimizer="sgd")
    assert sgd.optimizer * 2 == memory.optimizer
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations


def test_a_tied_output_layer_elsewhere_holds_a_copy() -> None:
    model = resolve_with_vocab(PLAIN)
    sizes, first, last = MetaModel(model), StagePart(range(2), True, False), StagePart(range(2, 3), False, True)
    assert [p.spec.name for p in sizes.parameters(last) if VOCAB in p.spec.shape] == ["embedding.word.weight"]
    assert sizes.count(first) + sizes.count(last) == sizes.count() + VOCAB * 24


@pytest.mark.parametrize("form", FORMS)
def test_the_stages_of_one_rank_together(form: str) -> None:
    model, first, last = resolve_with_vocab(FORMS[form]), StagePart(range(1), True, False), StagePart(range(1, 3), False, True)
    both, whole = memory_on_a_rank(model, first, last, tp=2, in_flight=[3, 1]), memory_on_a_rank(model, tp=2)
    assert (both.weights, both.gradients, both.optimizer) == (whole.weights, whole.gradients, whole.optimizer)
    # On two ranks a tied matrix is there twice: 2 x 24 x 64 elements, as 127 tokens are padded to 2 x 64.
    alone = [memory_on_a_rank(model, stage, tp=2, in_flight=[n]) for stage, n in ((first, 3), (last, 1))]
    twice = 0 if model.untie_embeddings_and_output_weights else 64 * 24
    assert sum(m.gradients for m in alone) == whole.gradients + 4 * twice
    assert both.activations == sum(m.activations for m in alone) > whole.activations


@pytest.mark.parametrize("form", FORMS)
def test_the_stages_compute_what_the_model_computes(form: str) -> None:
    model, seq = resolve_with_vocab(FORMS[form]), 8
    parts = [StagePart(range(1), True, False), StagePart(range(1, 3), False, False), StagePart(range(3, 3), False, True)]
    whole = MetaModel(model)
    flops = [stage_flops(whole, seq, part) for part in parts]
    assert sum(f.forward + f.backward + f.weight for f in flops) == flops_per_token(whole, seq)
    layer, head = layer_flops(whole, seq, StagePart(range(1))).total, head_flops(whole, seq, parts[2])
    assert flops[0].forward == layer and flops[1].forward == 2 * layer
    assert head == 2 * 24 * VOCAB + (2 * 24 * 24 if model.architecture == "bert" else 0)
    assert (flops[2].forward, flops[2].backward, flops[2].weight) == (3 * head, 0, 0)
    # Scores and weighted sum have two gradients, and none of a weight.
    core = 4 * seq * model.num_attention_heads * model.kv_channels
    assert flops[0].backward - flops[0].forward == flops[0].forward - flops[0].weight == core


@pytest.mark.parametrize(
    ("name", "vocab", "count"),
    [
        ("gpt2-125m", 50257, 124_439_808),  # as Hugging Face counts gpt2
        ("gpt2-345m", 50257, 354_823_168),  # and gpt2-medium
        ("llama-7b", 32000, 6_738_415_616),  # and Llama-2-7b
    ],
)
def test_parameter_counts_of_known_models(name: str, vocab: int, count: int) -> None:
    model = replace(resolve_with_vocab(ModelSettings(**PRESETS[name])), vocab_size=vocab)
    assert MetaModel(model).count() == count


@pytest.mark.parametrize(("tp", "padded"), [(1, 50304), (2, 50432), (8, 51200)])
def test_padded_vocabulary(tp: int, padded: int) -> None:
    assert padded_vocab_size(50257, tp, 128) == padded


def forward_flops(model: MetaModel, seq: int) -> int:
    """Return the FLOPs of one token's forward pass."""
    return layer_flops(model, seq, model.whole).total + head_flops(model, seq, model.whole)


@pytest.mark.parametrize("tp", [2, 4])
def test_flops_are_those_of_all_ranks(tp: int) -> None:
    model = resolve_with_vocab(replace(PLAIN, num_attention_heads=8))
    alone, cut = MetaModel(model), MetaModel(model, tp)
    assert forward_flops(cut, 8) == forward_flops(alone, 8)


def test_flops_by_hand() -> None:
    # GPT: 2 layers, h = 8, 2 heads of 4, f = 12, s = 5, vocabulary 11, one token forward.
    custom = resolve_with_vocab(replace(PLAIN, num_layers=2, hidden_size=8, num_attention_heads=2, ffn_hidden_size=12))
    layer = 2 * 8 * 24 + 2 * 5 * 8 + 2 * 5 * 8 + 2 * 8 * 8 + 2 * 8 * 12 + 2 * 12 * 8  # qkv, scores, sum, dense, up, down
    assert layer == 1056
    model = MetaModel(replace(custom, vocab_size=11))
    assert forward_flops(model, 5) == 2 * layer + 2 * 8 * 11 == 2288
    assert flops_per_token(model, 5) == 6864
    # Grouped queries and SwiGLU: 4 heads of 4 in 2 groups, h = 16, f = 24.
    llama = resolve_with_vocab(replace(FORMS["llama"], num_layers=1, hidden_size=16, num_attention_heads=4, ffn_hidden_size=24))
    model = MetaModel(replace(llama, vocab_size=11))
    assert forward_flops(model, 5) == 2 * 16 * 32 + 4 * 5 * 16 + 2 * 16 * 16 + 3 * 2 * 16 * 24 + 2 * 16 * 11


def test_flops_with_the_square_and_the_causal_half_of_attention() -> None:
    """Llama-3-8B at 8,192 tokens: 57.91 GFLOP a token over the whole square, and 51.47 in NVIDIA's tables."""
    shape = replace(FORMS["llama"], num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=8)
    vocab, seq = 128256, 8192
    config = replace(resolve_with_vocab(replace(shape, ffn_hidden_size=14336)), vocab_size=vocab)
    model = MetaModel(config)
    weights = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336) + 4096 * vocab
    # Megatron-Core 0.19, num_floating_point_operations: 3 x 2 x (weights + query width x s / 2 x 2) for each token.
    assert causal_flops_per_token(model, seq) == 6 * (weights + 32 * 4096 * seq // 2 * 2) == 51_470_401_536
    assert flops_per_token(model, seq) == 6 * (weights + 32 * 4096 * seq * 2) == 57_912_852_480
    assert round(57_912_852_480 / 51_470_401_536 - 1, 3) == 0.125
    odd = MetaModel(resolve_with_vocab(replace(PLAIN, num_layers=1, hidden_size=6, num_attention_heads=2)))
    core = 3 * 2 * 2 * 5 * 6
    assert causal_flops_per_token(odd, 5) == flops_per_token(odd, 5) - core // 2 and core % 2 == 0
    assert causal_flops_per_token(MetaModel(replace(config, architecture="bert")), seq) is None


def test_flops_are_the_published_formula() -> None:
    # arXiv 2104.04473 without recomputation: 72 B s l h^2 (1 + s / 6h + V / 12 l h)
    s, vocab, batch = 1024, 51200, 512
    model = MetaModel(replace(resolve_with_vocab(ModelSettings(**PRESETS["gpt-8.3b"])), vocab_size=vocab))
    layers, h = 72, 3072
    published = 72 * batch * s * layers * h**2 * (1 + s / (6 * h) + vocab / (12 * layers * h))
    assert flops_per_token(model, s) * s * batch == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (8, False), (8, True)])
def test_activations_are_the_published_formula(tp: int, sequence_parallel: bool) -> None:
    # arXiv 2205.05198, equations 1 to 4, for 16 bit.
    model, s, b = resolve_with_vocab(ModelSettings(**PRESETS["gpt-8.3b"])), 1024, 4
    h, a, layers = 3072, 32, 72
    per_layer = s * b * h * ((34 + 5 * a * s / h) / tp if sequence_parallel else 10 + 24 / tp + 5 * a * s / (h * tp))
    stage, how = StagePart(range(layers), False, False), dict(tp=tp, seq=s, rows=b, sequence_parallel=sequence_parallel)
    assert activation_bytes(model, stage, **how) == int(layers * per_layer)
    fused = replace(model, fused_attention_dropout=True)
    kept = activation_bytes(fused, stage, **how)
    assert layers * per_layer - kept == layers * s * b * 5 * a * s / tp
    assert activation_bytes(model, stage, 3, **how) == 3 * int(layers * per_layer)


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (8, False), (8, True)])
def test_recomputation_is_the_published_formula(tp: int, sequence_parallel: bool) -> None:
    # arXiv 2205.05198, equation 6 and section 5, for 16 bit: 34 s b h / t, and 2 s b h for what is run again whole.
    model, s, b, h, a = resolve_with_vocab(ModelSettings(**PRESETS["gpt-8.3b"])), 1024, 4, 3072, 32
    stage = StagePart(range(1, 73), False, False)

    def counted(in_flight: int = 1, **memory: object) -> tuple[int, int]:
        how = dict(tp=tp, seq=s, rows=b, sequence_parallel=sequence_parallel)
        found = count_activations(model, stage, **how, memory=MemoryConfig(**memory))  # type: ignore[arg-type]
        return found.held(in_flight, 0), found.transient

    linear, square = s * b * h * (34 / tp if sequence_parallel else 10 + 24 / tp), s * b * 5 * a * s // tp
    whole, start = int(linear + square), 2 * s * b * h // (tp if sequence_parallel else 1)
    assert counted() == (72 * whole, 0)
    assert counted(recompute_granularity="selective") == (72 * (whole - square), square)
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    assert counted(**full) == (72 * start, whole - start)
    assert counted(3, **full) == (3 * 72 * start, whole - start)
    assert counted(**full, recompute_num_layers=5) == (15 * start, 5 * whole - start)
    assert counted(**full, recompute_num_layers=100) == (start, 72 * whole - start)
    full["recompute_method"] = "block"
    assert counted(**full, recompute_num_layers=5) == (5 * start + 67 * whole, whole - start)
    assert counted(**full, recompute_num_layers=100) == (72 * start, whole - start)
    if tp > 1 and not sequence_parallel:  # the stage's own input came whole from another rank
        assert counted(**full, recompute_num_layers=72, distribute_saved_activations=True) == (72 * start // tp + start, whole)


def test_factors_of_weight_gradients_are_kept_even_where_inputs_are_not() -> None:
    # h = 3072, 16 bit: inputs h, h, h, 4 h and gradients 3 h, h, 4 h, h of the four linear layers.
    model, stage, tokens = resolve_with_vocab(ModelSettings(**PRESETS["gpt-8.3b"])), StagePart(range(1, 2), False, False), 1024
    found = count_activations(model, stage, seq=tokens, memory=MemoryConfig("full", "uniform"))
    assert found.held(5, split=2) == tokens * 3072 * (3 * 2 + 2 * 32)
    plain = count_activations(model, stage, seq=tokens)
    assert plain.held(5, split=2) == 5 * activation_bytes(model, stage, seq=tokens)


def test_the_stages_of_a_rank_run_again_one_at_a_time() -> None:
    model = resolve_with_vocab(PLAIN)
    first, last, memory = StagePart(range(1), True, False), StagePart(range(1, 3), False, False), MemoryConfig("full", "block")
    alone = [memory_on_a_rank(model, stage, memory=memory) for stage in (first, last)]
    both = memory_on_a_rank(model, first, last, memory=memory)
    passing = count_activations(model, first, memory=memory).transient
    assert 0 < passing == sum(m.activations for m in alone) - both.activations


def test_the_head_is_counted_with_one_chunk_of_logits() -> None:
    # Tokens in chunks of 2^27 // 25216 = 5322; on each of 2 ranks 50432 / 2 = 25216 rows; bf16.
    model, tokens, hidden, held = resolve_with_vocab(ModelSettings(**PRESETS["gpt-8.3b"])), 16 * 1024, 3072, 25216
    loss = 2 * 2 * tokens * hidden + (4 + 2) * held * hidden + (2 + 4 + 4) * (2**27 // held) * held
    model = replace(model, vocab_size=50257)
    assert fused_linear_cross_entropy_bytes(tokens, hidden, held, 2) == loss
    alone, how = StagePart(range(0), False, True), dict(tp=2, seq=1024, rows=16)
    assert activation_bytes(model, alone, **how) == loss + 2 * tokens * hidden
    assert activation_bytes(model, alone, **how, sequence_parallel=True) == loss + 2 * tokens * hidden // 2
    # Two more wait, each with the final norm's input and the gradient of its output; before the first there is nothing.
    assert activation_bytes(model, alone, 3, **how) == loss + 5 * 2 * tokens * hidden
    assert activation_bytes(model, alone, 0, **how) == 0
    # A vocabulary that fills a chunk in a few rows still gets the fewest; a short batch gets no more rows than tokens.
    chunk = 8 * MIN_ROWS * 2**20
    assert fused_linear_cross_entropy_bytes(1000, 1, 2**20, 4) == 8 * 1000 + 8 * 2**20 + chunk
    assert fused_linear_cross_entropy_bytes(10, 1, 100, 4) == 8 * 10 + 8 * 100 + 8 * 10 * 100


def test_the_chunks_are_those_of_the_loss() -> None:
    """Twice the rows of the vocabulary take the logits of the same chunk, a GPU's, until that is of the fewest tokens."""
    assert CHUNK["cuda"] == max(CHUNK.values())
    tokens, held = 2**22, 2**17
    logits = [fused_linear_cross_entropy_bytes(tokens, 1, n, 4) - 8 * tokens - 8 * n for n in (held, 2 * held, 4 * held, 2**20)]
    assert logits == [8 * CHUNK["cuda"]] * 3 + [8 * MIN_ROWS * 2**20]


@pytest.mark.parametrize("bf16", [False, True])
def test_the_head_takes_what_is_counted(bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the allocator's own record of four chunks; the input is there before the record begins."""
    tokens, hidden, held = 4 * MIN_ROWS, 256, 2048
    monkeypatch.setattr(cross_entropy, "CHUNK", {"cpu": 0})
    dtype, axis = torch.bfloat16 if bf16 else torch.float32, Axis.alone("tp")
    x, weight = (torch.randn(rows, hidden).to(dtype).requires_grad_() for rows in (tokens, held))
    labels, mask = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        shard = VocabShard.for_rank(held, axis, 1)
        cross_entropy.fused_linear_cross_entropy(x, weight, labels, mask, shard, axis, rows=MIN_ROWS).backward()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    record = [e["args"] for e in sorted(events, key=lambda e: e.get("ts", 0)) if e["name"] == "[memory]"]
    before = record[0]["Total Allocated"] - record[0]["Bytes"]
    peak = max(entry["Total Allocated"] for entry in record) - before
    assert peak == pytest.approx(fused_linear_cross_entropy_bytes(tokens, hidden, held, dtype.itemsize) - x.nbytes, rel=0.05)
