"""The one process that every layout is compared with: the same few steps of training, on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.resolve import resolve
from megatron.config.schema import (
    BatchSettings,
    DataSettings,
    LayoutSettings,
    MemoryConfig,
    ModelSettings,
    OptimSettings,
    PrecisionConfig,
    RunConfig,
    RunSettings,
)
from megatron.contract import Batch
from megatron.data.batch import document_indices, document_starts
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.job import Job
from megatron.parallel.spec import param_spec
from megatron.train.loop import advance
from megatron.train.run import Run, build_run

SEQ = 16
GPT2 = ModelSettings(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    max_position_embeddings=SEQ,
    vocab_size=127,  # prime: no tensor-parallel size divides it
    make_vocab_size_divisible_by=8,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
LLAMA = replace(
    GPT2,
    num_query_groups=2,
    activation="swiglu",
    normalization="RMSNorm",
    position_embedding_type="rope",
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
)
BERT = replace(GPT2, architecture="bert")


def with_dropout(model: ModelSettings) -> ModelSettings:
    """Return the model with dropout."""
    return replace(model, hidden_dropout=0.1, attention_dropout=0.1)


@dataclass(frozen=True)
class Setting:
    """A training setup: model, layout, batch, precision and optimizer.

    Attributes:
        per_virtual_stage: layers of a virtual stage.
        stage_layers: layers of each stage.
        split: further settings of the layout.
        masked: a third of the tokens do not count, unevenly over samples.
        documents: token 0 ends one, and positions and attention begin anew after it.
    """

    model: ModelSettings = GPT2
    tp: int = 1
    pp: int = 1
    cp: int = 1
    schedule: str | None = None
    per_virtual_stage: int | None = None
    stage_layers: tuple[int, ...] = ()
    split: tuple[tuple[str, Any], ...] = ()  # further settings of the layout
    sequence_parallel: bool = False
    micro_batch: int = 1
    global_batch: int = 4
    masked: bool = False
    documents: bool = False
    bf16: bool = False
    precision: PrecisionConfig | None = None
    optim: OptimSettings = field(
        default_factory=lambda: OptimSettings(lr=1e-2, clip_grad=1.0, lr_decay_style="cosine", lr_warmup_iters=4)
    )
    loss_average: str = "token"
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def config(self, world: int, steps: int) -> RunConfig:
        return resolve(
            RunSettings(
                model=self.model,
                layout=LayoutSettings(
                    tensor_model_parallel_size=self.tp,
                    pipeline_model_parallel_size=self.pp,
                    context_parallel_size=self.cp,
                    pipeline_schedule=self.schedule,
                    num_layers_per_virtual_pipeline_stage=self.per_virtual_stage,
                    pipeline_stage_layers=self.stage_layers,
                    sequence_parallel=self.sequence_parallel,
                    **dict(self.split),
                ),
                data=DataSettings(seq_length=SEQ, eod_mask_loss=self.masked),
                batch=BatchSettings(
                    micro_batch_size=self.micro_batch,
                    global_batch_size=self.global_batch,
                    train_iters=steps,
                    seed=5,
                    loss_average=self.loss_average,
                ),
                optim=self.optim,
                precision=self.precision or PrecisionConfig(bf16=self.bf16),
                memory=self.memory,
            ),
            world,
        )


def gpt_sample(number: int, vocab: int, masked: bool) -> tuple[Tensor, Tensor]:
    """Make one sample of a GPT: learnable, a function of its number alone.

    Args:
        number: of the sample.
        vocab: tokens lie below it.
        masked: leave out some of the tokens.

    Returns:
        Tokens `[SEQ + 1]` and loss mask `[SEQ]`.
    """
    generator = torch.Generator().manual_seed(number)
    first = int(torch.randint(0, vocab, (1,), generator=generator))
    tokens = (first + torch.arange(SEQ + 1)) % 12 * (vocab // 12)
    mask = (torch.rand(SEQ, generator=generator) < 0.05 * (1 + number % 13)).float() if masked else torch.ones(SEQ)
    return tokens, mask


def bert_micro_batch(numbers: range, vocab: int, *, binary: bool) -> Batch:
    """Make a micro-batch of a BERT: learnable, masked, padded, cut into two segments.

    Args:
        numbers: of the samples, of which they are functions.
        vocab: tokens lie below it.
        binary: with segments and the labels of the sentence-order head.
    """
    rows = []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        first, cut, end = (
            int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((0, vocab), (4, 9), (12, 17))
        )
        swapped, places = number % 3 == 0, torch.arange(SEQ)
        second, padding = places >= cut, places >= end
        labels = (first + places + (3 * second if swapped else 0)) % 12 * (vocab // 12)
        guessed = (torch.rand(SEQ, generator=generator) < 0.1 + 0.1 * (number % 3)) & ~padding
        rows.append((labels, guessed, second & ~padding, padding, swapped))
    labels, guessed, second, padding = (torch.stack(column) for column in list(zip(*rows, strict=True))[:4])
    return Batch(
        tokens=labels.masked_fill(guessed, vocab - 1).masked_fill(padding, 0),
        labels=labels.masked_fill(~guessed, 0),
        loss_mask=guessed.float(),
        positions=torch.arange(SEQ).expand(len(rows), SEQ),
        samples=torch.tensor(numbers),
        documents=padding.long() if padding.any() else None,
        segments=second.long() if binary else None,
        swapped=torch.tensor([int(row[4]) for row in rows]) if binary else None,
    )


def micro_batches(setting: Setting, vocab: int, consumed: int, dp_rank: int, dp_size: int) -> list[Batch]:
    """Make this rank's share of a step, as the loader deals it out.

    Args:
        setting: of the run.
        vocab: tokens lie below it.
        consumed: samples of the steps before.
        dp_rank: of this rank.
        dp_size: data-parallel ranks.
    """
    batches = []
    block = setting.micro_batch * dp_size
    for j in range(setting.global_batch // block):
        first = consumed + j * block + dp_rank * setting.micro_batch
        numbers = range(first, first + setting.micro_batch)
        if setting.model.architecture == "bert":
            batches.append(bert_micro_batch(numbers, vocab, binary=setting.model.bert_binary_head))
            continue
        drawn = [gpt_sample(n, vocab, setting.masked) for n in numbers]
        tokens = torch.stack([t for t, _ in drawn])
        positions = torch.arange(SEQ).expand(len(drawn), SEQ)
        mask = torch.stack([m for _, m in drawn])
        documents = None
        if setting.documents:
            ends = (tokens[:, :-1] == 0).numpy()
            documents = torch.from_numpy(document_indices(ends))
            positions = positions - torch.from_numpy(document_starts(ends))
        batches.append(Batch(tokens[:, :-1], tokens[:, 1:], mask, positions, torch.tensor(numbers), documents))
    return batches


class HeldOutLoader:
    """A loader of held-out samples, which begin at number 1000, dealt out over data-parallel ranks."""

    def __init__(self, run: Run, setting: Setting) -> None:
        self.run, self.setting, self.consumed = run, setting, 1000

    def next_batches(self, global_batch_size: int) -> list[Batch]:
        dp, vocab = self.run.mesh.dp, self.run.config.model.known_vocab_size
        batches = micro_batches(self.setting, vocab, self.consumed, dp.rank, dp.size)
        self.consumed += global_batch_size
        return batches

    def close(self) -> None:
        pass


def start_run(setting: Setting, steps: int) -> Run:
    """Build a run on the processes at hand."""
    initialized = dist.is_initialized()
    world = dist.get_world_size() if initialized else 1
    env = LaunchEnvironment(dist.get_rank() if initialized else 0, world)
    return build_run(setting.config(world, steps), Job(env, torch.device("cpu"), "gloo" if initialized else None))


def accumulate_gradients(run: Run, setting: Setting) -> None:
    """Make the gradients of the next step, without an update."""
    vocab = run.config.model.known_vocab_size
    batches = micro_batches(setting, vocab, run.state.consumed_samples, run.mesh.dp.rank, run.mesh.dp.size)
    run.optimizer.zero()
    run.step.scaled_loss.count(batches)
    run.pipeline.step(batches)


def train_steps(run: Run, setting: Setting, steps: int) -> list[tuple[float, ...]]:
    """Train a run for some steps.

    Args:
        run: built already; it may have trained before.
        setting: that it was built from.
        steps: how many.

    Returns:
        (loss, gradient norm) of each step; of a BERT with a binary head also the sentence-order loss.
    """
    curve = []
    for _ in range(steps):
        vocab = run.config.model.known_vocab_size
        batches = micro_batches(setting, vocab, run.state.consumed_samples, run.mesh.dp.rank, run.mesh.dp.size)
        report = run.step(batches, run.state)
        advance(run, report)
        curve.append((report.lm_loss, report.grad_norm, *(() if report.sop_loss is None else (report.sop_loss,))))
    return curve


NamedSlices = dict[str, tuple[tuple[slice, ...], Tensor]]


def main_weight_slices(run: Run) -> NamedSlices:
    """Copy this rank's main weights: global name -> (the slices that they are of the whole, values)."""
    return {s.name: (s.part.slices, s.data.detach().clone()) for s in run.weights.shards()}


def gradient_slices(run: Run) -> NamedSlices:
    """Copy this rank's gradients after the last step, as `main_weight_slices` does."""
    found: NamedSlices = {}
    for buffer in run.optimizer.buffers:
        for p, view in zip(buffer.parameters, buffer.views(buffer.grads), strict=True):
            spec = param_spec(p)
            found[spec.name] = (spec.part.slices, spec.local(view).clone())
    return found


def trajectory(setting: Setting, steps: int) -> tuple[list[tuple[float, ...]], NamedSlices, NamedSlices]:
    """Train a fresh run, and return its curve, initial and final weights; tests run it on ranks and in one process."""
    run = start_run(setting, steps)
    initial = main_weight_slices(run)
    return train_steps(run, setting, steps), initial, main_weight_slices(run)


def max_relative_error(whole: NamedSlices, part: NamedSlices) -> float:
    """Return the largest difference of a rank's slices from the reference's, relative to each tensor's largest value."""
    worst = 0.0
    for name, (where, values) in part.items():
        expected = whole[name][1][where]
        if expected.numel():
            worst = max(worst, float((values - expected).abs().max() / whole[name][1].abs().max().clamp(min=1e-3)))
    return worst


def worst(curve: list[tuple[float, ...]], expected: list[tuple[float, ...]]) -> float:
    """Largest relative difference of two curves' losses and gradient norms."""
    pairs = [pair for step, reference in zip(curve, expected, strict=True) for pair in zip(step, reference, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)
