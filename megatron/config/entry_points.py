"""Plug-ins of installed packages, declared as entry points: listed beside the built-in ones, imported only when used.

A plug-in cannot replace a built-in one of the same name. Packages declare entry points in their pyproject.toml, and
importlib.metadata reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, TypeVar

Own = TypeVar("Own")


def with_installed(own: Mapping[str, Own], group: str) -> Mapping[str, Own | EntryPoint]:
    """Return the built-in plug-ins by name, then those that installed packages add to the group under other names."""
    return MappingProxyType({**own, **{found.name: found for found in entry_points(group=group) if found.name not in own}})


def load_entry(found: EntryPoint) -> Any:
    """Import the object that an entry point names. ValueError, whose text begins with "needs", when that fails."""
    try:
        return found.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"needs {found.value}, which cannot be loaded: {error}") from error
