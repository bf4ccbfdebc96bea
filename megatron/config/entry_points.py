"""Find the plug-ins that installed packages declare as entry points, and import one when it is used.

Packages declare entry points in their pyproject.toml, and importlib.metadata reads them. A plug-in cannot replace a built-in
implementation of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, TypeVar

BuiltIn = TypeVar("BuiltIn")


def with_installed(built_in: Mapping[str, BuiltIn], group: str) -> Mapping[str, BuiltIn | EntryPoint]:
    """Return the built-in implementations, and the entry points of a group that have other names, by name."""
    return MappingProxyType({**built_in, **{e.name: e for e in entry_points(group=group) if e.name not in built_in}})


def load_entry(entry: EntryPoint) -> Any:
    """Import the object that an entry point names.

    Raises:
        ValueError: the import fails; the text continues a message that begins with the flag.
    """
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"needs {entry.value}, which cannot be loaded: {error}") from error
