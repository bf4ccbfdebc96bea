"""Find the first value of a step that was not finite, with its layer and stage, its rank and its samples.

When a step is skipped, only the norm of the summed gradients is known not to be finite. So its micro-batches are run again, one
at a time, without an update. The search reports the first module whose output is not finite; else the loss; else the parameter
whose gradient the backward pass computes first. If everything is finite in the second run, a transient fault of a device or its
memory is the likely cause, and the report says so.

Skipped steps are rare, so the cost of the second run does not matter; other steps cost nothing extra.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.contract import Batch
from megatron.mesh.mesh import Axis, Mesh
from megatron.parallel.spec import param_spec
from megatron.pipeline.executor import Executor, StepOutput

FORWARD, LOSS, BACKWARD = range(3)  # phases of a micro-batch, in the order of computation


@dataclass(frozen=True, order=True)
class Finding:
    """A value that was not finite. Findings are ordered as a step computes them, so the smallest may have caused the others.

    Attributes:
        micro_batch: number of the micro-batch in the step of the rank, from 0.
        phase: FORWARD, LOSS or BACKWARD.
        depth: sort key of the stage: its number, negated in the backward pass, which visits the stages in reverse.
        place: position of the value in the order of computation on the stage.
        rank: the rank that found the value.
        what: description of the value, `the output of layers.3.mlp`.
        stage: the pipeline stage.
        samples: numbers of the samples in the micro-batch.
        coordinates: the rank's coordinates on the parallel axes, `: dp 1, tp 0`; empty for one rank.
    """

    micro_batch: int
    phase: int
    depth: int
    place: int
    rank: int
    what: str
    stage: int
    samples: tuple[int, ...]
    coordinates: str


@dataclass(frozen=True)
class NonFinite:
    """The result of the search over all ranks.

    Attributes:
        first: the first finding over all ranks.
        ranks: number of ranks that found something.
        world: number of all ranks.
        reproduced: the step was not run again, or was not finite in the second run either.
    """

    first: Finding
    ranks: int
    world: int
    reproduced: bool

    @property
    def layer(self) -> int | None:
        """Number of the layer in the model; None if the value is not in a layer."""
        match = re.search(r"\blayers\.(\d+)\.", self.first.what + ".")
        return int(match[1]) if match else None

    def __str__(self) -> str:
        first = self.first
        layer = "" if self.layer is None else f"layer {self.layer}, "
        spread = f", {self.ranks} of {self.world} ranks found some" if self.world > 1 else ""
        advice = "" if self.reproduced else "; a second run of the step was finite, so suspect the device"
        where = f"{layer}stage {first.stage}, rank {first.rank}{first.coordinates}, samples {format_ranges(first.samples)}"
        return f"{first.what} is not finite ({where}{spread}){advice}"


def format_ranges(numbers: Sequence[int]) -> str:
    """Return numbers as ranges: `3, 5-8` for 3, 5, 6, 7, 8."""
    ranges: list[list[int]] = []  # first and last number of each
    for number in sorted(set(numbers)):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


class NonFiniteSearch:
    """Searches a step on this rank for values that are not finite; `first_finding` compares those of all ranks.

    Args:
        pipeline: runs the step.
        mesh: the parallel axes.
        zero: zeros the gradient buffers.
    """

    def __init__(self, pipeline: Executor, mesh: Mesh, zero: Callable[[], None]) -> None:
        self.pipeline, self.mesh, self.zero = pipeline, mesh, zero
        self.stages: Mapping[int, nn.Module] = pipeline.stages  # type: ignore[assignment]  # stages are modules
        self.found: list[Finding] = []

    def check_loss(self, output: StepOutput, samples: tuple[int, ...], micro_batch: int = 0) -> None:
        """Record the loss of this rank if it is not finite.

        Args:
            output: the losses of a step or of one micro-batch.
            samples: numbers of the samples in that step or micro-batch.
            micro_batch: number of the micro-batch; 0 for a whole step.
        """
        if not math.isfinite(float(output.loss)):
            stage = max(self.stages)
            self._record(micro_batch, LOSS, stage, 0, "the loss", stage=stage, samples=samples)

    def check_gradients(self, samples: tuple[int, ...], micro_batch: int = 0) -> None:
        """Record the first gradient that is not finite, in the order of the backward pass: the last layer's first."""
        for stage in sorted(self.stages, reverse=True):
            for place, parameter in enumerate(reversed(list(self.stages[stage].parameters()))):
                grad: Tensor | None = getattr(parameter, "main_grad", parameter.grad)
                if grad is not None and not is_finite(grad):
                    what = f"the gradient of {param_spec(parameter).name}"
                    self._record(micro_batch, BACKWARD, -stage, place, what, stage=stage, samples=samples)
                    return

    def rerun(self, batches: Sequence[Batch]) -> None:
        """Run the step's micro-batches once more, each alone, and record what is not finite. Collective over a pipeline.

        The gradient buffers are zero afterwards.
        """
        scaled_loss = self.pipeline.scaled_loss
        # Each micro-batch keeps its weight among all of the step; otherwise the scaled loss would overflow elsewhere.
        self.pipeline.scaled_loss = lambda loss, _: scaled_loss(loss, len(batches))
        try:
            for number, batch in enumerate(batches):
                samples = sample_ids([batch])
                self.zero()
                with self._check_outputs(number, samples):
                    output = self.pipeline.step([batch])
                self.check_loss(output, samples, number)
                self.check_gradients(samples, number)
        finally:
            self.pipeline.scaled_loss = scaled_loss
            self.zero()

    @contextmanager
    def _check_outputs(self, micro_batch: int, samples: tuple[int, ...]) -> Iterator[None]:
        """Record the outputs of modules that are not finite inside the block, in the order of computation."""
        calls = count()  # gives a module the same number on all ranks that share its stage, so that findings are comparable

        def check_output(name: str, stage: int, module: nn.Module, inputs: Any, output: Any) -> None:
            place = next(calls)
            if isinstance(output, Tensor) and not is_finite(output):
                self._record(micro_batch, FORWARD, stage, place, f"the output of {name}", stage=stage, samples=samples)

        handles = [
            module.register_forward_hook(partial(check_output, name, stage))
            for stage, transformer in self.stages.items()
            for name, module in transformer.named_modules()
            if name  # not the stage as a whole
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(
        self, micro_batch: int, phase: int, depth: int, place: int, what: str, *, stage: int, samples: tuple[int, ...]
    ) -> None:
        mesh = self.mesh
        axes = [axis for axis in (mesh.dp, mesh.pp, mesh.cp, mesh.tp) if axis.size > 1]
        coordinates = f": {', '.join(f'{axis.name} {axis.rank}' for axis in axes)}" if axes else ""
        order = micro_batch, phase, depth, place, mesh.rank
        self.found.append(Finding(*order, what=what, stage=stage, samples=samples, coordinates=coordinates))

    def first_finding(self) -> tuple[Finding | None, int]:
        """Return the first finding over all ranks, and the number of ranks that found something. Collective."""
        own = min(self.found, default=None)
        findings = [found for found in gather_findings(own, self.mesh.world) if found is not None]
        return min(findings, default=None), len(findings)


def investigate(
    pipeline: Executor, mesh: Mesh, zero: Callable[[], None], batches: Sequence[Batch], output: StepOutput, *, skipped: bool
) -> NonFinite | None:
    """Find the first value that was not finite in a step that was skipped, or whose loss was not finite. Collective.

    A skipped step is run again, which overwrites its gradients.

    Args:
        pipeline: runs the step.
        mesh: the parallel axes.
        zero: zeros the gradient buffers.
        batches: the step's micro-batches of this rank.
        output: the losses of the step on this rank.
        skipped: the step was skipped, so the weights are still those that it used.

    Returns:
        The first value that was not finite; None if no rank finds one, since only the norm overflowed.
    """
    samples = sample_ids(batches)
    # Check these before the second run overwrites them: a transient fault of a device is visible in them alone.
    original = NonFiniteSearch(pipeline, mesh, zero)
    original.check_loss(output, samples)
    if skipped:
        original.check_gradients(samples)
        second = NonFiniteSearch(pipeline, mesh, zero)
        second.rerun(batches)
        first, ranks = second.first_finding()
        if first is not None:
            return NonFinite(first, ranks, mesh.world.size, reproduced=True)
    first, ranks = original.first_finding()
    # A step with an update is not run again, since the weights have changed.
    return None if first is None else NonFinite(first, ranks, mesh.world.size, reproduced=not skipped)


def sample_ids(batches: Sequence[Batch]) -> tuple[int, ...]:
    """Return the numbers of the samples in micro-batches, for the message."""
    return tuple(number for batch in batches for number in batch.samples.tolist())


def is_finite(x: Tensor) -> bool:
    """Return whether all values of a tensor are finite. Waits for the device."""
    return bool(torch.isfinite(x).all())


def gather_findings(own: Finding | None, world: Axis) -> list[Finding | None]:
    """Return the finding of each rank, in the order of ranks. Collective."""
    if world.group is None:
        return [own]
    findings: list[Finding | None] = [None] * world.size
    dist.all_gather_object(findings, own, group=world.group)
    return findings
