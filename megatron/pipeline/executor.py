"""Executor of one rank's program of a training step, for any schedule. Only this module stores activations.

Actions consume and produce tensors. `_inbox` contains the inputs that have arrived or are being received: hidden states for F,
gradients of a stage's output for B and I. If the neighbouring stage is on the same rank, its output is put there directly; the
last stage's F computes the loss and also its gradient, which it puts there for its own B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge

from megatron.contract import Batch, Loss, StagePart
from megatron.launch.watchdog import Watchdog
from megatron.parallel.weight_grad import DeferredWeightGrad, WeightGradStore
from megatron.pipeline.profile import Recorder
from megatron.pipeline.schedules.lower import (
    EARLY,
    Instruction,
    Receive,
    Send,
    SendsComplete,
    channel_pairs,
    consumer,
    forward_only,
    lower,
)
from megatron.pipeline.schedules.schedule import Action, Op, Schedule
from megatron.pipeline.schedules.simulate import validate
from megatron.pipeline.transfer import Channels, PendingReceive

ACTION_NAMES = {Op.F: "forward", Op.B: "backward", Op.I: "input gradient", Op.W: "weight gradient"}


@dataclass(frozen=True)
class StepOutput:
    """Totals over a step's micro-batches, fp32 scalars without a graph; zero on ranks without the model's head.

    loss: sum of the losses of unmasked tokens. tokens: number of unmasked tokens. means: sum of the micro-batches' mean losses.
    order: sum of the samples' sentence-order losses; 0 if the model has none.
    """

    loss: Tensor
    tokens: Tensor
    means: Tensor
    order: Tensor


class Stage(Protocol):
    """A stage's module, as the executor calls it; `model.transformer.Transformer` is one."""

    part: StagePart
    dtype: torch.dtype

    def hidden(self, x: Tensor | None, batch: Batch) -> Tensor:
        """Return the output `[seq, batch, hidden]` of this stage. x: the previous stage's output; None for the first."""
        ...

    def loss(self, x: Tensor, batch: Batch) -> Loss:
        """Return the loss of the final hidden states."""
        ...

    def hidden_shape(self, batch: Batch) -> tuple[int, ...]:
        """Return the shape of the hidden states between stages."""
        ...

    def train(self, mode: bool = True) -> object:
        """Switch dropout on or off."""
        ...


@dataclass
class InFlight:
    """A micro-batch in a stage between its forward and its backward pass.

    x: the stage's input, None on the first stage. edge: autograd edge of its output, whose values are not stored. products: the
    weight gradients that I defers to W.
    """

    x: Tensor | None
    edge: GradientEdge | None
    products: Sequence[DeferredWeightGrad] = ()


class Executor:
    """Executor of the forward and backward passes of this rank's stages.

    stages: stage number -> module.
    schedule: function of the number of micro-batches.
    placement: stage number -> pipeline rank of the stage.
    scaled_loss: function of a micro-batch's loss and the number of micro-batches; returns the scalar to differentiate.
    weight_grad_store: store of the weight gradients that the schedule defers, shared with the stages' linear layers.
    share: function that returns this rank's share of a whole micro-batch; by default all of it.
    early: actions by which receives are posted ahead (see `lower.py`), 0 if transfers block; a program's first run uses 0.
    peak_in_flight: maximum number of (stage, micro-batch) activations that were in memory at once in the last step.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        schedule: Callable[[int], Schedule],
        placement: tuple[int, ...],
        channels: Channels,
        scaled_loss: Callable[[Loss, int], Tensor],
        weight_grad_store: WeightGradStore,
        *,
        watch: Watchdog,
        share: Callable[[Batch], Batch] = lambda batch: batch,
        early: int = EARLY,
    ) -> None:
        self.stages, self.schedule, self.channels, self.scaled_loss = stages, schedule, channels, scaled_loss
        self.weight_grad_store, self.watch, self.share, self.device = weight_grad_store, watch, share, channels.device
        self.early = early
        self.recorder = Recorder()
        self.peak_in_flight = 0
        self._lowered: dict[tuple[int, bool, int], list[Instruction]] = {}
        self._already_run: set[object] = set()
        self._handlers = {Op.F: self._forward, Op.B: self._backward, Op.I: self._input_grad, Op.W: self._weight_grad}
        self._last = len(placement) - 1
        channels.connect(list(channel_pairs(placement)))

    def step(self, batches: Sequence[Batch]) -> StepOutput:
        """Add the gradients of all micro-batches to the parameters' gradients. Collective over the pipeline."""
        return self._run(batches, backward=True)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> StepOutput:
        """Run only the forward passes, with dropout off. Collective over the pipeline."""
        for stage in self.stages.values():
            stage.train(False)
        try:
            return self._run(batches, backward=False)
        finally:
            for stage in self.stages.values():
                stage.train(True)

    def _program(self, batches: Sequence[Batch], backward: bool) -> list[Instruction]:
        """Return this rank's program, with transfers, lowered once for each key and cached.

        The first run with a new number of micro-batches, direction or batch shape posts no receive early, because it
        compiles kernels and allocates memory.
        """
        run = len(batches), backward, frozenset(batch.tokens.shape for batch in batches)
        early = self.early if run in self._already_run else 0
        self._already_run.add(run)
        key = len(batches), backward, early
        if key not in self._lowered:
            schedule = self.schedule(len(batches))
            validate(schedule)
            programs = lower(schedule if backward else forward_only(schedule), early)
            self._lowered[key] = programs[self.channels.up.rank]
        return self._lowered[key]

    def _run(self, batches: Sequence[Batch], *, backward: bool) -> StepOutput:
        whole = [batch.to(self.device) for batch in batches]
        self._counts = [batch.loss_mask.sum() for batch in whole]
        self._batches = [self.share(batch) for batch in whole]
        self._inbox: dict[tuple[int, int, bool], Tensor | PendingReceive] = {}
        self._outbox: dict[Action, Tensor] = {}
        self._in_flight: dict[tuple[int, int], InFlight] = {}
        self._totals = torch.zeros(4, device=self.device)  # the fields of StepOutput, fp32
        self.peak_in_flight = 0
        for item in self._program(batches, backward):
            if isinstance(item, Receive):
                stage, batch = next(iter(self.stages.values())), self._batches[item.produced.micro_batch]
                pending = self.channels.receive(stage.hidden_shape(batch), stage.dtype, item.peer, item.number)
                self._inbox[item.stage, item.produced.micro_batch, item.produced.op is Op.F] = pending
            elif isinstance(item, Send):
                self.channels.send(self._outbox.pop(item.produced), item.peer, item.number)
            elif isinstance(item, SendsComplete):
                for number in item.numbers:
                    self.channels.wait_send(number)
            else:
                self._run_action(item)
        self.watch.waiting("the end of the step's transfers")
        self.channels.wait_all_sends()
        self.watch.idle()
        return StepOutput(*self._totals.unbind())

    def _run_action(self, action: Action) -> None:
        """Wait for the action's input, then run it."""
        description = partial(describe_action, action)
        self.watch.waiting(description)
        x = self._recv_input(action)
        # The watchdog times evaluations separately: they have no gradients and are compiled separately.
        kind = f"{action.op.value}{action.stage}" if torch.is_grad_enabled() else f"evaluation {action.stage}"
        self.watch.computing(kind, description)
        begun = self.recorder.mark()
        self._handlers[action.op](action, x)
        self.recorder.record(action, begun)
        self.peak_in_flight = max(self.peak_in_flight, len(self._in_flight))

    def _recv_input(self, action: Action) -> Tensor | None:
        """Wait for the stage's input for F, or the gradient of its output for B and I: `[seq, batch, hidden]`."""
        if action.op is Op.W or (action.op is Op.F and action.stage == 0):
            return None
        received = self._inbox.pop((action.stage, action.micro_batch, action.op is Op.F))
        return received.wait() if isinstance(received, PendingReceive) else received

    def _send_output(self, action: Action, x: Tensor) -> None:
        """Pass on the output of `action`: to a stage of this rank, or to the program's next send."""
        stage = consumer(action, self._last + 1)
        if stage is None:
            return
        if stage in self.stages:
            self._inbox[stage, action.micro_batch, action.op is Op.F] = x
        else:
            self._outbox[action] = x

    def _forward(self, action: Action, x: Tensor | None) -> None:
        stage, batch = self.stages[action.stage], self._batches[action.micro_batch]
        training = torch.is_grad_enabled()
        if x is not None and training:
            x.requires_grad_()
        y = stage.hidden(x, batch)  # [seq, batch, hidden]
        if training:
            self._in_flight[action.stage, action.micro_batch] = InFlight(x, get_gradient_edge(y))
        if stage.part.head:
            self._loss_backward(action, stage, y.detach(), batch)
        else:
            self._send_output(action, y.detach())

    def _loss_backward(self, action: Action, stage: Stage, x: Tensor, batch: Batch) -> None:
        """Compute the loss of the final hidden states `[seq, batch, hidden]` and at once its gradient.

        No activation of the output layer then outlives F. `scaled_loss` gets the number of unmasked tokens of the whole
        micro-batch, not of this rank's share, because it computes a mean over all of them.
        """
        count = self._counts[action.micro_batch]
        if torch.is_grad_enabled():
            loss = stage.loss(x.requires_grad_(), batch)  # x is a leaf of a graph of its own
            self.scaled_loss(replace(loss, tokens=count), len(self._batches)).backward()  # type: ignore[no-untyped-call]
            if x.grad is not None:
                self._inbox[action.stage, action.micro_batch, False] = x.grad
        else:
            loss = stage.loss(x, batch)
        value, tokens = loss.sum.detach(), loss.tokens
        order = torch.zeros_like(value) if loss.order is None else loss.order.detach()
        self._totals += torch.stack([value, tokens, value / count.clamp(min=1.0), order])

    def _backward(self, action: Action, grad: Tensor | None) -> None:
        self._differentiate(action, self._in_flight.pop((action.stage, action.micro_batch)), grad)

    def _input_grad(self, action: Action, grad: Tensor | None) -> None:
        in_flight = self._in_flight[action.stage, action.micro_batch]
        with self.weight_grad_store.deferring() as in_flight.products:
            self._differentiate(action, in_flight, grad)

    def _differentiate(self, action: Action, in_flight: InFlight, grad: Tensor | None) -> None:
        """Run autograd through the stage, then free its graph and its input."""
        if in_flight.edge is None or grad is None:
            raise RuntimeError(f"{describe_action(action)}: the stage has no graph, or no gradient of its output arrived")
        _run_backward(in_flight.edge, grad)
        if in_flight.x is not None and in_flight.x.grad is not None:
            self._send_output(action, in_flight.x.grad)
        in_flight.x = in_flight.edge = None  # frees the graph; `products` refer to the tensors that W needs

    def _weight_grad(self, action: Action, _: Tensor | None) -> None:
        for product in self._in_flight.pop((action.stage, action.micro_batch)).products:
            product.run()


def _run_backward(edge: GradientEdge, grad: Tensor) -> None:
    """Accumulate gradients into the leaves of the graph of `edge`. grad: gradient of the edge's output.

    This is what torch.autograd.backward calls after its checks, which import sympy to compare two shapes: half a second in
    every process.
    """
    _engine_run_backward((edge,), (grad,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def describe_action(action: Action) -> str:
    """Describe an action for messages: `stage 1, forward of micro-batch 3`."""
    return f"stage {action.stage}, {ACTION_NAMES[action.op]} of micro-batch {action.micro_batch}"
