"""Tensors that a stage really holds of a micro-batch: there when the simulator says so, and gone when it says so."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from ranks import on_ranks
from reference import GPT2, Setting, micro_batches, start_run

from megatron.pipeline import executor
from megatron.pipeline.executor import Executor
from megatron.pipeline.schedules.schedule import SCHEDULES, Op
from megatron.pipeline.schedules.simulate import Costs, simulate

LAYERS = 9


class KeptTensor:
    """One tensor that autograd keeps for a backward pass."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class TensorLedger:
    """The living tensors of each (stage, micro-batch): what autograd keeps, stage inputs, factors that W will use."""

    def __init__(self, pipeline: Executor) -> None:
        self.pipeline, self.held, self.peak = pipeline, {}, 0
        self.acting = None
        self.act = pipeline._run_action
        pipeline._run_action = self

    def __call__(self, action) -> None:
        self.acting = action.stage, action.micro_batch
        parameters = {p.untyped_storage().data_ptr() for stage in self.pipeline.stages.values() for p in stage.parameters()}

        def pack(tensor):
            if action.op is not Op.F or tensor.untyped_storage().data_ptr() in parameters:
                return tensor
            kept = KeptTensor(tensor)
            self.keep(kept)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor if isinstance(kept, KeptTensor) else kept):
            self.act(action)
        live = self.pipeline._in_flight.get(self.acting)
        for product in live.products if live is not None else ():
            self.keep(product)
        self.peak = max(self.peak, len(self.held))

    def keep(self, thing) -> None:
        whose = self.acting
        self.held.setdefault(whose, set()).add(id(thing))
        weakref.finalize(thing, self.drop, whose, id(thing))

    def drop(self, whose, number) -> None:
        self.held[whose].discard(number)
        if not self.held[whose]:
            del self.held[whose]


def held_at_most(setting: Setting, leak: bool = False) -> tuple[int, int, int]:
    """The peak of a step as counted, as simulated, and what is left after it."""
    run = start_run(setting, 1)
    ledger = TensorLedger(run.pipeline)
    batches = micro_batches(setting, 127, 0, run.mesh.dp.rank, run.mesh.dp.size)
    run.step.scaled_loss.count(batches)
    leaked: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        if leak:  # outputs and their graphs stay
            for stage in run.stages.values():
                hidden = stage.hidden
                patch.setattr(stage, "hidden", lambda x, batch, hidden=hidden: leaked.append(hidden(x, batch)) or leaked[-1])
            backward = torch.autograd.backward
            patch.setattr(torch.autograd, "backward", lambda y, grad=None, *_, **__: backward(y, grad, retain_graph=True))
            patch.setattr(executor, "_run_backward", torch.autograd.backward)
        run.pipeline.step(batches)
    predicted = simulate(run.pipeline.schedule(len(batches)), Costs()).peak_activations[run.mesh.pp.rank]
    return ledger.peak, predicted, len(ledger.held)


def setting_for_schedule(name: str, pp: int) -> Setting:
    setting = Setting(replace(GPT2, num_layers=LAYERS), pp=pp, schedule=name, global_batch=8)
    return replace(setting, per_virtual_stage=2) if name == "interleaved" else setting


@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_tensors_are_held_as_the_simulator_says(name, pp):
    for counted, predicted, left in on_ranks(pp, held_at_most, setting_for_schedule(name, pp)):
        assert counted == predicted
        assert left == 0


def test_negative_control_a_leak_is_seen():
    for counted, predicted, left in on_ranks(2, held_at_most, setting_for_schedule("1f1b", 2), True):
        assert left == 8 and counted > predicted
