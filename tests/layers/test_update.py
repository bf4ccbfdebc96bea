"""The update of a step is torch's own, bit for bit, and a step does not import the compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.config.optimizers import update_rules
from megatron.config.schema import OptimSettings
from megatron.optim.update import ShardedUpdate, Target

LR, DECAY = 1e-2, 0.1
METHODS = {
    "adam fused": OptimSettings(lr=LR, adam_beta2=0.95, adam_eps=1e-6),
    "adam foreach": OptimSettings(lr=LR, adam_beta2=0.95, adam_kernel="foreach"),
    "sgd": OptimSettings(lr=LR, optimizer="sgd", sgd_momentum=0.8),
    "sgd without momentum": OptimSettings(lr=LR, optimizer="sgd", sgd_momentum=0.0),
}


def build_torch_optimizer(config: OptimSettings, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    groups = [{"params": parameters[:1], "weight_decay": DECAY}, {"params": parameters[1:], "weight_decay": 0.0, "lr": LR / 2}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=LR, momentum=config.sgd_momentum, fused=True)
    betas, fused = (config.adam_beta1, config.adam_beta2), config.adam_kernel == "fused"
    return torch.optim.AdamW(groups, lr=LR, betas=betas, eps=config.adam_eps, fused=fused, foreach=not fused)


@pytest.mark.parametrize("multiplier", [1.0, 0.37])
@pytest.mark.parametrize("name", METHODS)
def test_updates_equal_torchs_own_optimizer(name: str, multiplier: float) -> None:
    config, draw = METHODS[name], torch.Generator().manual_seed(3)
    begun = [torch.randn(33, generator=draw), torch.randn(7, generator=draw)]
    expected = [torch.nn.Parameter(tensor.clone()) for tensor in begun]
    reference = build_torch_optimizer(config, list(expected))
    mains = [tensor.clone() for tensor in begun]
    (rule,) = update_rules(config.optimizer)
    targets = [Target(mains[0], True, method=rule.method), Target(mains[1], False, decoupled=True, method=rule.method)]
    update = ShardedUpdate(config, targets)
    for _ in range(4):
        gradients = [torch.randn(tensor.shape, generator=draw) for tensor in begun]
        for parameter, gradient in zip(expected, gradients, strict=True):
            divided = name == "adam foreach"  # the fused kernels divide by the inverse
            parameter.grad = gradient * multiplier if divided else gradient / torch.tensor(1.0 / multiplier)
        reference.step()
        update.begin((LR, LR / 2), weight_decay=DECAY, multiplier=multiplier)
        for number, gradient in enumerate(gradients):
            update.step(number, gradient)
    for number, parameter in enumerate(expected):
        assert torch.equal(mains[number], parameter)
        for moment, values in update.state(number).items():
            theirs = reference.state[parameter].get(moment)
            assert torch.equal(values, torch.zeros_like(values) if theirs is None else theirs)
    assert update.steps == (4 if config.optimizer == "adam" else 0)


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
def test_a_step_imports_no_compiler(kernel: str) -> None:
    """Torch's optimizer classes and torch.autograd.backward do: two seconds of every rank's start."""
    program = f"""
import sys
from reference import GPT2, Setting, trajectory
from megatron.config.optimizers import update_rules
from megatron.config.schema import OptimSettings
trajectory(Setting(GPT2, optim=OptimSettings(lr=1e-2, adam_kernel="{kernel}")), 1)
sys.exit(" ".join({{"torch._dynamo", "sympy"}} & sys.modules.keys()) or 0)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
