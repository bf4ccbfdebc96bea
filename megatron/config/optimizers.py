"""Table of the optimizers that a run can have, each a tuple of update rules. Imports no torch.

A parameter is updated by the first rule that applies to its name and shape. A rule names the function that makes the update
method, which is imported when a run is built, and the number of state tensors that the method needs. Configuration, memory
plan, optimizer and checkpoints use nothing but the table.

A package outside this one adds an optimizer by an entry point of the group `megatron.optimizers`, in its pyproject.toml:

    [project.entry-points."megatron.optimizers"]
    muon = "my_package.muon:RULES"

RULES is such a tuple. The package is imported only when the optimizer is used, and cannot take the name of a built-in one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import MappingProxyType

from megatron.config.entry_points import load_entry, with_installed

GROUP = "megatron.optimizers"


def every_parameter(name: str, shape: tuple[int, ...]) -> bool:
    """Return True for any parameter: the default of `UpdateRule.applies`."""
    return True


@dataclass(frozen=True)
class UpdateRule:
    """A rule by which an optimizer updates some of the parameters.

    Attributes:
        method: `module:function`; the function makes a `megatron.optim.update.Method` from an OptimConfig and a `Target`.
        moments: number of fp32 state tensors per target, each of the target's size.
        applies: returns whether the rule applies to a parameter, given its global name and its unsharded shape.
        whole: the method needs whole parameters, so the distributed optimizer must not split one between ranks.
    """

    method: str
    moments: int
    applies: Callable[[str, tuple[int, ...]], bool] = every_parameter
    whole: bool = False


# The state of AdamW is the first and the second moment of the gradient; that of SGD is the momentum.
ADAMW = UpdateRule("megatron.optim.update:adamw_method", moments=2)
SGD = UpdateRule("megatron.optim.update:sgd_method", moments=1)

BUILT_IN: Mapping[str, tuple[UpdateRule, ...]] = MappingProxyType({"adam": (ADAMW,), "sgd": (SGD,)})
OPTIMIZERS: Mapping[str, tuple[UpdateRule, ...] | EntryPoint] = with_installed(BUILT_IN, GROUP)


def update_rules(optimizer: str) -> tuple[UpdateRule, ...]:
    """Return the rules of an optimizer. ValueError if it is unknown, or its entry point names no tuple of rules."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer}; known are {', '.join(OPTIMIZERS)}")
    built_in_or_entry = OPTIMIZERS[optimizer]
    if isinstance(built_in_or_entry, tuple):
        return built_in_or_entry
    rules = load_entry(built_in_or_entry)
    if not isinstance(rules, tuple) or not all(isinstance(rule, UpdateRule) for rule in rules):
        raise ValueError(f"needs {built_in_or_entry.value}, which is not a tuple of UpdateRule")
    return rules


def rule_for(optimizer: str, name: str, shape: tuple[int, ...]) -> UpdateRule:
    """Return the rule by which an optimizer updates a parameter.

    Args:
        optimizer: a name in `OPTIMIZERS`.
        name: the parameter's global name.
        shape: its unsharded shape.

    Raises:
        ValueError: no rule applies.
    """
    for rule in update_rules(optimizer):
        if rule.applies(name, shape):
            return rule
    raise ValueError(f"no rule of the optimizer {optimizer} applies to {name} {list(shape)}")
