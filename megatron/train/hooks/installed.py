"""Hooks of other packages: entry points of the group `megatron.hooks`.

A package brings one in its pyproject.toml, and takes part in every run of an environment in which it is installed; the run says
so in a line. The entry point names a class, or a function without arguments that makes the hook:

    [project.entry-points."megatron.hooks"]
    samples = "my_package.samples:WriteSamples"

The hook is a `megatron.train.loop.Hook`, on every rank. It comes before the log line, so it can put values of its own there,
in `training.extra_metrics`; and on the first rank it can add a sink to `training.sinks` before training begins. What is not
training time stands in `with training.timer.paused()`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from megatron.launch.errors import InputError
from megatron.train.loop import Hook

GROUP = "megatron.hooks"


def installed_hooks() -> dict[str, Hook]:
    """Return the hooks of installed packages, by what a run says of each.

    Raises:
        InputError: a package does not hold what it should.
    """
    found = sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))
    return {f"{entry.name}, {entry.value}": _made(entry) for entry in found}


def _made(entry: EntryPoint) -> Hook:
    try:
        hook = entry.load()()
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(f"the hook {entry.name} needs {entry.value}, which cannot be loaded: {error}") from error
    if not isinstance(hook, Hook):
        raise InputError(f"the hook {entry.name} needs {entry.value}, which makes no Hook")
    return hook
