"""Hooks of other packages: entry points of the group `megatron.hooks`.

A package declares a hook in its pyproject.toml. The hook then takes part in every run of an environment in which the package is
installed, and the run prints a line about it. The entry point names a class, or a function without arguments that returns one:

    [project.entry-points."megatron.hooks"]
    samples = "my_package.samples:WriteSamples"

The hook is a `megatron.train.loop.Hook`, created on every rank. It is called before the log line is written, so it can add
values to that line in `training.extra_metrics`; in `before_training`, on the first rank, it can add a sink to `training.sinks`.
Work that is not training time belongs in `with training.timer.paused()`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from megatron.launch.errors import InputError
from megatron.train.loop import Hook

GROUP = "megatron.hooks"


def installed_hooks() -> dict[str, Hook]:
    """Return the hooks of installed packages, by the description that a run prints of each.

    Raises:
        InputError: an entry point cannot be loaded, or is not a hook.
    """
    found = sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))
    return {f"{entry.name}, {entry.value}": _load_hook(entry) for entry in found}


def _load_hook(entry: EntryPoint) -> Hook:
    try:
        hook = entry.load()()
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(f"the hook {entry.name} needs {entry.value}, which cannot be loaded: {error}") from error
    if not isinstance(hook, Hook):
        raise InputError(f"the hook {entry.name} needs {entry.value}, which makes no Hook")
    return hook
