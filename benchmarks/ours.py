"""Our side: a run built from Python as the entry script builds it, and our model in other people's data parallelism."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from baselines import CLIP, LR, Step, training_step
from cases import Case, Dims
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megatron.config.resolve import resolve
from megatron.config.schema import (
    BatchSettings,
    DataSettings,
    LayoutSettings,
    ModelConfig,
    ModelSettings,
    OptimSettings,
    PrecisionConfig,
    RunConfig,
    RunSettings,
)
from megatron.contract import Batch, StagePart
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.job import Job, job
from megatron.model.gpt import GPT
from megatron.model.init import initialize
from megatron.parallel.tensor_parallel import TensorParallel
from megatron.train.run import build_run


def batch_from_text(tokens: Tensor, labels: Tensor) -> Batch:
    """Return tokens `[rows, seq]` and labels as a batch of one document a row."""
    rows, seq = tokens.shape
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=torch.ones(rows, seq, device=tokens.device),
        positions=torch.arange(seq, device=tokens.device).expand(rows, seq),
        samples=torch.arange(rows, device=tokens.device),
    )


def micro_batches_from_text(case: Case, tokens: Tensor, labels: Tensor) -> list[Batch]:
    """Cut a rank's text into its micro-batches.

    Args:
        case: says how many rows a micro-batch has.
        tokens: `[rows, seq]`.
        labels: `[rows, seq]`.
    """
    rows = case.dims.micro_batch
    return [batch_from_text(*pair) for pair in zip(tokens.split(rows), labels.split(rows), strict=True)]


@dataclass(frozen=True)
class Options:
    """Options in which our contenders differ.

    Attributes:
        eager: layers are not compiled on a GPU, as they are by default.
        fusion: weight gradients are added within their products; only in layers that are not compiled.
        kernel: --adam-kernel.
        bf16_gradients: gradients are accumulated and reduced in bf16 on a GPU.
        shared_memory: CPU ranks of one host talk through shared memory, not gloo.
    """

    eager: bool = False
    fusion: bool = True
    kernel: str = "fused"
    bf16_gradients: bool = False
    shared_memory: bool = True


DEFAULT = Options()


def build_config(case: Case, schedule: str | None = None, options: Options = DEFAULT) -> RunConfig:
    """Build the configuration that a command line with the same numbers would give.

    Args:
        case: model and layout.
        schedule: of the pipeline; None for the default.
        options: that change only number formats and kernels.
    """
    dims, gpu = case.dims, case.device == "cuda"
    config = RunSettings(
        model=ModelSettings(
            num_layers=dims.layers,
            hidden_size=dims.width,
            num_attention_heads=dims.heads,
            max_position_embeddings=dims.seq,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            vocab_size=dims.vocab,
        ),
        layout=LayoutSettings(
            tensor_model_parallel_size=case.tp,
            sequence_parallel=case.sequence_parallel,
            context_parallel_size=case.cp,
            shared_memory=options.shared_memory,
            pipeline_model_parallel_size=case.pp,
            pipeline_schedule=schedule,
        ),
        data=DataSettings(seq_length=dims.seq),
        batch=BatchSettings(
            micro_batch_size=dims.micro_batch,
            global_batch_size=dims.micro_batch * case.micro_batches * case.dp,
            train_iters=10**6,
            compile=gpu and not options.eager,
        ),
        optim=OptimSettings(lr=LR, lr_decay_style="constant", clip_grad=CLIP, adam_kernel=options.kernel),
        precision=PrecisionConfig(
            bf16=gpu,
            grad_reduce_in_bf16=gpu and options.bf16_gradients,
            gradient_accumulation_fusion=options.fusion,
        ),
    )
    return resolve(config, case.ranks)


@contextmanager
def process(case: Case) -> Iterator[Job]:
    """Set up a process as the entry script does."""
    with job(LaunchEnvironment.from_environ(os.environ)) as started:
        torch.set_num_threads(case.threads)
        yield started


@contextmanager
def ours(case: Case, options: Options = DEFAULT) -> Iterator[Step]:
    """Build a whole run of the framework: its mesh, model, executor and optimizer."""
    with process(case) as started:
        run = build_run(build_config(case, options=options), started)
        yield lambda tokens, labels: run.step(micro_batches_from_text(case, tokens, labels), run.state).lm_loss


class MeanLoss(nn.Module):
    """Our GPT as a module that returns the mean loss, for wrappers that know nothing of it."""

    def __init__(self, dims: Dims, config: ModelConfig) -> None:
        super().__init__()
        self.gpt = GPT(config, StagePart(range(dims.layers), embedding=True, head=True), TensorParallel.alone())
        initialize(self.gpt, config, seed=1234)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        loss = self.gpt(None, batch_from_text(tokens, labels))
        mean: Tensor = loss.sum / loss.tokens
        return mean


@contextmanager
def ours_in_ddp(case: Case) -> Iterator[Step]:
    """Build our model with torch's DistributedDataParallel and AdamW."""
    with process(case) as started:
        model = DistributedDataParallel(MeanLoss(case.dims, build_config(case).model).to(started.device))
        yield training_step(model, model, bf16=False)
