"""A configuration under examination: what every rule looks at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron.config.errors import Problem
from megatron.config.options import by_name, flag_text
from megatron.config.resolve import resolve
from megatron.config.schema import RunConfig


@dataclass(frozen=True)
class Case:
    """A configuration under examination.

    typed: as the user gave it. resolved: with the derived settings. world: number of ranks. dp: data-parallel ranks,
    None where the layout does not fit the world. bad: fields that already have a problem. planning: a dry run, which may
    leave out what a run reads from disk.
    """

    typed: RunConfig
    resolved: RunConfig
    world: int
    dp: int | None
    bad: frozenset[str] = frozenset()
    planning: bool = False

    def flag_text(self, *names: str) -> str:
        """The settings as flags with their resolved values: `--a 1` and `--b 2`."""
        parts = [flag_text(name, self[name]) for name in names]
        return " and ".join(parts) if len(parts) < 3 else ", ".join(parts[:-1]) + " and " + parts[-1]

    def __getitem__(self, name: str) -> Any:
        section, _, key = name.partition(".")
        return getattr(getattr(self.resolved, section), key)

    def given(self, name: str) -> bool:
        """Whether the setting differs from the schema's default, as the user gave it."""
        section, _, key = name.partition(".")
        return bool(getattr(getattr(self.typed, section), key) != by_name()[name].default)

    @property
    def iterations_chosen(self) -> bool:
        """Whether --train-iters was set to something else than what follows from --train-samples."""
        chosen = self.typed.batch.train_iters
        without = dataclasses.replace(self.typed, batch=dataclasses.replace(self.typed.batch, train_iters=None))
        return chosen is not None and chosen != resolve(without, self.world).batch.train_iters


Rule = Callable[[Case], Iterator[Problem]]


def divisors(n: int, limit: int = 8) -> str:
    """The divisors of n as text, the smallest `limit` of them."""
    found = [d for d in range(1, n + 1) if n % d == 0] if n <= 65536 else []
    return ", ".join(map(str, found[:limit])) + (", ..." if len(found) > limit else "")
