"""Table of the optimizers that a run can have, each a tuple of update rules. Imports no torch.

Each parameter follows the first rule that applies to its name and shape. A rule names the code that updates the parameter (a
function of another file, imported when a run is built) and says how much state that code keeps, so configuration, memory plan,
optimizer and checkpoints follow from the row alone.

A package outside this one adds an optimizer by an entry point of the group `megatron.optimizers`, in its pyproject.toml:

    [project.entry-points."megatron.optimizers"]
    muon = "my_package.muon:RULES"

RULES is such a tuple of rules. The package is imported only when the optimizer is used, and cannot take the
name of a built-in one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import MappingProxyType

from megatron.config.entry_points import load_entry, with_installed

GROUP = "megatron.optimizers"


def every_parameter(name: str, shape: tuple[int, ...]) -> bool:
    """Return True: the default of `UpdateRule.applies`."""
    return True


@dataclass(frozen=True)
class UpdateRule:
    """The update of some of the parameters by an optimizer.

    Attributes:
        method: `module:function`; the function makes a `megatron.optim.update.Method` from an OptimConfig and a `Target`.
        moments: number of fp32 state tensors that the method keeps for each target, each of the target's size.
        applies: tells for a parameter's global name and unsharded shape whether it follows the rule.
        whole: the method needs each parameter whole, so that a rank's slice of the state must not cut one.
    """

    method: str
    moments: int
    applies: Callable[[str, tuple[int, ...]], bool] = every_parameter
    whole: bool = False


# AdamW keeps the first and the second moment of the gradient, SGD its momentum.
ADAMW = UpdateRule("megatron.optim.update:adamw_method", moments=2)
SGD = UpdateRule("megatron.optim.update:sgd_method", moments=1)

OWN: Mapping[str, tuple[UpdateRule, ...]] = MappingProxyType({"adam": (ADAMW,), "sgd": (SGD,)})
OPTIMIZERS: Mapping[str, tuple[UpdateRule, ...] | EntryPoint] = with_installed(OWN, GROUP)


def update_rules(optimizer: str) -> tuple[UpdateRule, ...]:
    """Return the rules of an optimizer. ValueError when it is unknown, or its package does not hold such a tuple."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer}; known are {', '.join(OPTIMIZERS)}")
    found = OPTIMIZERS[optimizer]
    if isinstance(found, tuple):
        return found
    rules = load_entry(found)
    if not isinstance(rules, tuple) or not all(isinstance(rule, UpdateRule) for rule in rules):
        raise ValueError(f"needs {found.value}, which is no tuple of UpdateRule")
    return rules


def rule_for(optimizer: str, name: str, shape: tuple[int, ...]) -> UpdateRule:
    """Return the rule of an optimizer that a parameter follows.

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
