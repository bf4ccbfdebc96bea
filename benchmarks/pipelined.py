"""Contenders of the pipeline benchmark: our executor, and `torch.distributed.pipelining` as its users would write it.

Everybody trains the same GPT-2, with a tied output layer, from the same weights on the same text. torch has three forms:

    plain modules     GPT-2 in plain torch, cut as ours is cut; the bar
    cut evenly        the same, with as many layers on each rank, wherever the output layer is
    our stages        our modules, memory and optimizer, so that nothing but the executor differs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import baselines
import ours
import torch
import torch.distributed as dist
import torch.nn.functional as F
from baselines import CLIP, LR, PlainGPT, Step
from cases import Case
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleZBVZeroBubble

from megatron.contract import Batch, StagePart
from megatron.model.gpt import GPT
from megatron.model.init import initialize
from megatron.model.transformer import Transformer
from megatron.parallel.tensor_parallel import TensorParallel
from megatron.pipeline.executor import Executor, StepOutput
from megatron.pipeline.partition import ranges_from_counts
from megatron.plan.stages import StagePlan, plan_stages
from megatron.train.run import Run, build_run

OUR_SCHEDULES = {f"ours-{name}": name for name in ("1f1b", "zb-h1", "zb-h2", "zb-v")}
ZB_V_RUNS_SINCE = (2, 12)  # before, torch's own ZB-V fails over gloo while it sets its stages up: "Pair is not connected"


@dataclass(frozen=True)
class Pipelined:
    """A contender of the pipeline benchmark.

    Attributes:
        step: an optimizer step; gives the mean loss on every rank.
        gradients: its forward and backward passes alone.
        executor: ours, where the contender has it.
    """

    step: Step
    gradients: Callable[[Tensor, Tensor], object]
    executor: Executor | None = None


def without_broken(case: Case, torch_version: str = torch.__version__) -> Case:
    """Return the case without the contenders that this version of torch cannot run."""
    release = tuple(int(number) for number in torch_version.split(".")[:2])
    if release >= ZB_V_RUNS_SINCE:
        return case
    return replace(case, contenders=tuple(name for name in case.contenders if name != "torch-zb-v"))


def build_plan(case: Case, contender: str) -> StagePlan:
    """Return the layers of each stage for a contender: cut as ours are, except where layers are counted out evenly."""
    schedule = "zb-v" if contender.endswith("zb-v") else OUR_SCHEDULES.get(contender, "1f1b")
    plan = plan_stages(ours.build_config(case, schedule))
    if not contender.endswith("even"):
        return plan
    counts = [(case.dims.layers + stage) // case.pp for stage in range(case.pp)]
    parts = tuple(StagePart(layers, s == 0, s == case.pp - 1) for s, layers in enumerate(ranges_from_counts(counts)))
    return StagePlan(plan.placement, parts, plan.chunks)


@contextmanager
def our_pipeline(case: Case, contender: str) -> Iterator[Pipelined]:
    """Build a whole run of the framework."""
    with ours.process(case) as started:
        run = build_run(ours.build_config(case, OUR_SCHEDULES[contender]), started)
        step, gradients = step_and_gradients(case, run, run.pipeline)
        yield Pipelined(step, gradients, run.pipeline)


def step_and_gradients(
    case: Case, run: Run, executor: Executor | TorchExecutor
) -> tuple[Step, Callable[[Tensor, Tensor], None]]:
    """Build our run's step, and one of its gradients alone.

    Args:
        case: says how text is cut into micro-batches.
        run: ours.
        executor: of the passes; ours or torch's.
    """

    def step(tokens: Tensor, labels: Tensor) -> float:
        return run.step(ours.micro_batches_from_text(case, tokens, labels), run.state).lm_loss

    def gradients(tokens: Tensor, labels: Tensor) -> None:
        run.optimizer.zero()
        executor.step(ours.micro_batches_from_text(case, tokens, labels))

    return step, gradients


class OurStage(nn.Module):
    """A stage of ours for an executor that knows only tensors: tokens or hidden states in, hidden states or the loss out.

    Hidden states are `[seq, micro_batch, width]`. The loss is a micro-batch's share of the step's mean.
    """

    def __init__(self, stage: Transformer, micro_batches: int) -> None:
        super().__init__()
        self.stage, self.micro_batches = stage, micro_batches

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.stage.part.embedding:
            return self.stage.hidden(None, ours.batch_from_text(x, labels))
        batch = ours.batch_from_text(labels, labels)  # only the first stage reads tokens
        x = self.stage.hidden(x, batch)
        if not self.stage.part.head:
            return x
        loss = self.stage.loss(x, batch)
        return loss.sum / (loss.tokens * self.micro_batches)


class TorchExecutor:
    """torch's 1F1B in the place of our executor: `step` adds the gradients of all micro-batches, and gives the totals."""

    def __init__(self, case: Case, stage: Transformer, rank: int) -> None:
        wrapped = PipelineStage(OurStage(stage, case.micro_batches), rank, case.pp, torch.device("cpu"))
        # The stage's output is the loss, and already a share of the mean.
        self.schedule = Schedule1F1B(wrapped, case.micro_batches, loss_fn=lambda loss, _: loss, scale_grads=False)
        self.part = stage.part

    def step(self, batches: Sequence[Batch]) -> StepOutput:
        labels = torch.cat([batch.labels for batch in batches])
        first = [torch.cat([batch.tokens for batch in batches])] if self.part.embedding else []
        losses: list[Tensor] = []
        self.schedule.step(*first, labels=labels, target=labels, losses=losses, return_outputs=False)
        if not self.part.head:
            return StepOutput(*torch.zeros(4).unbind())
        mean = torch.stack(losses).sum().detach()
        tokens = torch.tensor(float(labels.numel()))
        return StepOutput(mean * tokens, tokens, mean * len(batches), torch.zeros(()))


@contextmanager
def torch_with_our_stages(case: Case) -> Iterator[Pipelined]:
    """Build our run with torch's executor."""
    with ours.process(case) as started:
        run = build_run(ours.build_config(case, "1f1b"), started)
        rank = started.env.rank
        executor = TorchExecutor(case, run.stages[rank], rank)
        run.step.pipeline = executor  # type: ignore[attr-defined]  # a `train.step.Step`, which asks for no more than this has
        yield Pipelined(*step_and_gradients(case, run, executor))


def plain_model(case: Case) -> PlainGPT:
    """Build a PlainGPT with the weights that ours begins with."""
    dims, config = case.dims, ours.build_config(case)
    gpt = GPT(config.model, StagePart(range(dims.layers), embedding=True, head=True), TensorParallel.alone())
    initialize(gpt, config.model, config.batch.seed)
    weights = gpt.state_dict()
    plain = PlainGPT(dims)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(our_weight(name, weights, dims.heads)[: parameter.shape[0]])  # ours has a padded vocabulary
    return plain


def our_weight(name: str, weights: dict[str, Tensor], heads: int) -> Tensor:
    """Return our weight for a parameter of PlainGPT.

    Args:
        name: of the parameter there.
        weights: ours, by our names.
        heads: number of heads, over which queries, keys and values are split.
    """
    words = name.split(".")
    thirds = {"query": 0, "key": 1, "value": 2}
    if words[-2] in thirds:  # ours has each head's query, key and value behind one another
        fused = weights[f"layers.{words[1]}.attention.qkv.{words[-1]}"]
        return fused.unflatten(0, (heads, 3, -1))[:, thirds[words[-2]]].flatten(0, 1)
    renamed = {"blocks": "layers", "attention_norm": "input_norm", "out": "dense", "norm": "final_norm"}
    return weights[".".join(renamed.get(word, word) for word in words)]


class PlainStage(nn.Module):
    """The part of a PlainGPT that `part` names: tokens or hidden states in, hidden states or logits out."""

    def __init__(self, model: PlainGPT, part: StagePart) -> None:
        super().__init__()
        self.embedding = model.embedding if part.embedding else None
        self.blocks = nn.ModuleList(model.blocks[layer] for layer in part.layers)
        self.norm, self.head = (model.norm, model.head) if part.head else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


class PlainUpdate:
    """Clipping by the norm over both ranks, and AdamW; torch's pipelines leave that, and the tied matrix, to their users."""

    def __init__(self, stages: Sequence[PlainStage]) -> None:
        self.parameters = list(nn.ModuleList(stages).parameters())
        inputs = [stage.embedding.word.weight for stage in stages if stage.embedding is not None]
        outputs = [stage.head.weight for stage in stages if stage.head is not None]
        # One matrix where both ends are on a rank; else each of the two ranks has a copy, and the first one's counts.
        self.copy = (inputs + outputs)[0] if bool(inputs) != bool(outputs) else None
        self.counted = [p for p in self.parameters if inputs or p is not self.copy]
        kinds = [([p for p in self.parameters if p.dim() > 1], 0.01), ([p for p in self.parameters if p.dim() == 1], 0.0)]
        self.optimizer = torch.optim.AdamW([{"params": ps, "weight_decay": decay} for ps, decay in kinds], lr=LR, fused=True)

    def __call__(self, loss: Tensor) -> float:
        """Update the weights, and return the step's mean loss. loss: this rank's share of it."""
        if self.copy is not None and self.copy.grad is not None:
            dist.all_reduce(self.copy.grad)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.counted if p.grad is not None])
        totals = torch.stack([norm.square(), loss])
        dist.all_reduce(totals)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, CLIP, totals[0].sqrt())
        self.optimizer.step()
        return float(totals[1])


@contextmanager
def torch_pipeline(case: Case, contender: str) -> Iterator[Pipelined]:
    """GPT-2 in plain torch under torch's 1F1B, or its ZB-V."""
    with baselines.process(case) as device:
        rank, plan = dist.get_rank(), build_plan(case, contender)
        model = plain_model(case)
        numbers = plan.stages_on(rank)
        modules = [PlainStage(model, plan.parts[number]) for number in numbers]
        del model  # this rank keeps its own part
        stages = [
            PipelineStage(module, number, len(plan.parts), device) for module, number in zip(modules, numbers, strict=True)
        ]

        def compute_loss(logits: Tensor, labels: Tensor) -> Tensor:
            """A share of the step's mean, so that no gradient has to be scaled afterwards."""
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) / case.micro_batches

        schedule: Any
        if contender.endswith("zb-v"):
            schedule = ScheduleZBVZeroBubble(list(stages), case.micro_batches, loss_fn=compute_loss, scale_grads=False)
        else:
            schedule = Schedule1F1B(stages[0], case.micro_batches, loss_fn=compute_loss, scale_grads=False)
        update = PlainUpdate(modules)
        begins, ends = 0 in numbers, len(plan.parts) - 1 in numbers

        def gradients(tokens: Tensor, labels: Tensor) -> Tensor:
            update.optimizer.zero_grad(set_to_none=True)
            losses: list[Tensor] = []
            first = [tokens] if begins else []
            schedule.step(*first, target=labels if ends else None, losses=losses, return_outputs=False)
            return torch.stack(losses).sum().detach() if ends else torch.zeros(())

        yield Pipelined(lambda tokens, labels: update(gradients(tokens, labels)), gradients)


CONTENDERS: dict[str, Callable[[Case], AbstractContextManager[Pipelined]]] = {
    **{name: partial(our_pipeline, contender=name) for name in OUR_SCHEDULES},
    **{name: partial(torch_pipeline, contender=name) for name in ("torch-1f1b", "torch-1f1b-even", "torch-zb-v")},
    "torch-1f1b-our-stages": torch_with_our_stages,
}
