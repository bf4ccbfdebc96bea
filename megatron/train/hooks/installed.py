"""Load the hooks of other packages, which are entry points of the group `megatron.hooks`.

A package declares a hook in its pyproject.toml. Every run in an environment in which the package is installed then calls the
hook, and prints a line that names it. The entry point names a hook class, or a function without arguments that returns a hook:

    [project.entry-points."megatron.hooks"]
    samples = "my_package.samples:WriteSamples"

The hook is a `megatron.train.loop.Hook`, one on every rank. It is called before the log line is written, so it can add
values to that line in `training.extra_metrics`; in `before_training`, on the first rank, it can add a sink to `training.sinks`.
Work that is not training time belongs in `with training.timer.paused()`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from megatron.launch.errors import InputError
from megatron.train.loop import Hook

GROUP = "megatron.hooks"


def installed_hooks() -> dict[str, Hook]:
    """Return the hooks of installed packages, keyed by the description that a run prints: `name, module:attribute`.

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
        raise InputError(f"the hook {entry.name} needs {entry.value}, which returns no Hook")
    return hook
