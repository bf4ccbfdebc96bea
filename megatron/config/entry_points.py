"""Things that other packages bring by entry points: listed beside our own, imported only where they are used.

A name that is ours stays ours. The format is that of importlib.metadata, which reads it from the packages' pyproject.toml.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, TypeVar

Own = TypeVar("Own")


def with_installed(own: Mapping[str, Own], group: str) -> Mapping[str, Own | EntryPoint]:
    """Return our own things by name, and after them those that installed packages bring to the group under other names."""
    return MappingProxyType({**own, **{found.name: found for found in entry_points(group=group) if found.name not in own}})


def load_entry(found: EntryPoint) -> Any:
    """Import what an entry point names. ValueError, which begins with "needs", where that is not there."""
    try:
        return found.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"needs {found.value}, which cannot be loaded: {error}") from error
