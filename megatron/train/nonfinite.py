"""Find the value that was not finite in a step: its layer and stage, its rank, its samples.

A skipped step knows no more than that the norm of the summed gradients was not finite. So its micro-batches are run once
more, one at a time and without an update: the first module whose output is not finite, else the loss, else the parameter
whose gradient the backward pass makes first, is the event. What is finite the second time was a fault of the moment, in
a device or in its memory, and is told as such.

Skipped steps are rare, so the second run costs nothing that counts; other steps pay nothing.
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

FORWARD, LOSS, BACKWARD = range(3)


@dataclass(frozen=True, order=True)
class Finding:
    """A value that was not finite. Findings are ordered as a step makes them: the first is the cause of the rest.

    Attributes:
        micro_batch: its number in the step of this rank.
        phase: FORWARD, LOSS or BACKWARD.
        depth: the stage, negative in the backward pass, which goes through them from the last.
        place: position among the values of the stage.
        rank: the one that saw it.
        what: the value in words.
        stage: the pipeline stage.
        samples: numbers of the samples in the micro-batch.
        coordinates: the rank's place on the parallel axes, in words.
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
    """The event that a step was not finite, as all ranks together found it.

    Attributes:
        first: the first finding over all ranks.
        ranks: number of ranks that found something.
        world: number of all ranks.
        again: it was found in a second run of the step.
    """

    first: Finding
    ranks: int
    world: int
    again: bool

    @property
    def layer(self) -> int | None:
        """Global number of the layer; None outside the layers."""
        match = re.search(r"\blayers\.(\d+)\.", self.first.what + ".")
        return int(match[1]) if match else None

    def __str__(self) -> str:
        first = self.first
        layer = "" if self.layer is None else f"layer {self.layer}, "
        places = f", {self.ranks} of {self.world} ranks saw some" if self.world > 1 else ""
        moment = "" if self.again else "; a second run of the step was finite, so suspect the device"
        where = f"{layer}stage {first.stage}, rank {first.rank}{first.coordinates}, samples {format_ranges(first.samples)}"
        return f"{first.what} is not finite ({where}{places}){moment}"


def format_ranges(numbers: Sequence[int]) -> str:
    """Return numbers as ranges: `3, 5-8` for 3, 5, 6, 7, 8."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found)


class NonFiniteSearch:
    """Searches one step on this rank for values that are not finite; `agree` joins what the ranks found.

    Args:
        pipeline: runs the step.
        mesh: the parallel axes.
        zero: zeros the gradient buffers.
    """

    def __init__(self, pipeline: Executor, mesh: Mesh, zero: Callable[[], None]) -> None:
        self.pipeline, self.mesh, self.zero = pipeline, mesh, zero
        self.stages: Mapping[int, nn.Module] = pipeline.stages  # type: ignore[assignment]  # stages are modules
        self.found: list[Finding] = []

    def loss(self, output: StepOutput, samples: tuple[int, ...], micro_batch: int = 0) -> None:
        """Note a loss of this rank that is not finite."""
        if not math.isfinite(float(output.loss)):
            stage = max(self.stages)
            self._note(micro_batch, LOSS, stage, 0, "the loss", stage=stage, samples=samples)

    def gradients(self, samples: tuple[int, ...], micro_batch: int = 0) -> None:
        """Note the gradient that is not finite and that the backward pass makes first: in the last of the layers."""
        for stage in sorted(self.stages, reverse=True):
            for place, parameter in enumerate(reversed(list(self.stages[stage].parameters()))):
                grad: Tensor | None = getattr(parameter, "main_grad", parameter.grad)
                if grad is not None and not is_finite(grad):
                    what = f"the gradient of {param_spec(parameter).name}"
                    self._note(micro_batch, BACKWARD, -stage, place, what, stage=stage, samples=samples)
                    return

    def again(self, batches: Sequence[Batch]) -> None:
        """Run the step's micro-batches once more, each alone, and note what is not finite. Collective over a pipeline.

        Leaves no gradients.
        """
        scaled_loss = self.pipeline.scaled_loss
        # Each with the weight that it had among the others, or a loss scale would overflow elsewhere.
        self.pipeline.scaled_loss = lambda loss, _: scaled_loss(loss, len(batches))
        try:
            for number, batch in enumerate(batches):
                samples = sample_ids([batch])
                self.zero()
                with self._watched(number, samples):
                    output = self.pipeline.step([batch])
                self.loss(output, samples, number)
                self.gradients(samples, number)
        finally:
            self.pipeline.scaled_loss = scaled_loss
            self.zero()

    @contextmanager
    def _watched(self, micro_batch: int, samples: tuple[int, ...]) -> Iterator[None]:
        """Note outputs of modules that are not finite inside the block, in the order in which they are made."""
        calls = count()  # the same on all ranks that hold parts of a stage

        def look(name: str, stage: int, module: nn.Module, inputs: Any, output: Any) -> None:
            place = next(calls)
            if isinstance(output, Tensor) and not is_finite(output):
                self._note(micro_batch, FORWARD, stage, place, f"the output of {name}", stage=stage, samples=samples)

        handles = [
            module.register_forward_hook(partial(look, name, stage))
            for stage, whole in self.stages.items()
            for name, module in whole.named_modules()
            if name
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(
        self, micro_batch: int, phase: int, depth: int, place: int, what: str, *, stage: int, samples: tuple[int, ...]
    ) -> None:
        mesh = self.mesh
        axes = [axis for axis in (mesh.dp, mesh.pp, mesh.cp, mesh.tp) if axis.size > 1]
        coordinates = f": {', '.join(f'{axis.name} {axis.rank}' for axis in axes)}" if axes else ""
        order = micro_batch, phase, depth, place, mesh.rank
        self.found.append(Finding(*order, what=what, stage=stage, samples=samples, coordinates=coordinates))

    def agree(self) -> tuple[Finding | None, int]:
        """Return the first finding over all ranks, and how many of them found something. Collective."""
        own = min(self.found, default=None)
        everywhere = [found for found in gather_findings(own, self.mesh.world) if found is not None]
        return min(everywhere, default=None), len(everywhere)


def investigate(
    pipeline: Executor, mesh: Mesh, zero: Callable[[], None], batches: Sequence[Batch], output: StepOutput, *, skipped: bool
) -> NonFinite | None:
    """Find what was not finite in a step that was skipped, or whose loss alone was not finite. Collective.

    A skipped step is run once more, and its gradients are gone afterwards.

    Args:
        pipeline: runs the step.
        mesh: the parallel axes.
        zero: zeros the gradient buffers.
        batches: the step's micro-batches of this rank.
        output: the step's losses of this rank.
        skipped: there was no update, so the weights are still those of the step.

    Returns:
        The event; None where no rank can find anything: nothing is known but that the norm was not finite.
    """
    samples = sample_ids(batches)
    # Before the second run, which overwrites the gradients: what a device got wrong for a moment is seen only here.
    before = NonFiniteSearch(pipeline, mesh, zero)
    before.loss(output, samples)
    if skipped:
        before.gradients(samples)
        after = NonFiniteSearch(pipeline, mesh, zero)
        after.again(batches)
        first, ranks = after.agree()
        if first is not None:
            return NonFinite(first, ranks, mesh.world.size, again=True)
    first, ranks = before.agree()
    # The weights have moved since a step that was not skipped: a second run would be another step.
    return None if first is None else NonFinite(first, ranks, mesh.world.size, again=not skipped)


def sample_ids(batches: Sequence[Batch]) -> tuple[int, ...]:
    """Return the numbers of the samples in some micro-batches."""
    return tuple(number for batch in batches for number in batch.samples.tolist())


def is_finite(x: Tensor) -> bool:
    """Return whether all values of a tensor are finite. Waits for the device."""
    return bool(torch.isfinite(x).all())


def gather_findings(value: Finding | None, world: Axis) -> list[Finding | None]:
    """Return every rank's finding, by rank. Collective."""
    if world.group is None:
        return [value]
    values: list[Finding | None] = [None] * world.size
    dist.all_gather_object(values, value, group=world.group)
    return values
