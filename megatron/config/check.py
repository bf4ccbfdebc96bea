"""A configuration under examination, as every rule sees it, and what the rules of the sections share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.config.errors import Problem
from megatron.config.option import Option


@dataclass(frozen=True)
class ConfigCheck:
    """A configuration under examination.

    raw, resolved: the `RunSettings` as the user gave them, and with the derived ones as far as they follow; the type cannot be
    named here, since the sections' rules import this file. world: number of ranks. dp: data-parallel ranks, None where the
    layout does not fit the world. options: by `section.field`. derive: fills in what follows, for a number of ranks. invalid:
    fields that already have a problem. planning: a dry run, which may leave out what a run reads from disk.
    """

    raw: Any
    resolved: Any
    world: int
    dp: int | None
    options: Mapping[str, Option]
    derive: Callable[[Any, int], Any]
    invalid: frozenset[str] = frozenset()
    planning: bool = False

    def flag(self, name: str) -> str:
        """Return the flag of the setting `section.field`."""
        return self.options[name].flag

    def flag_text(self, *names: str) -> str:
        """Return the settings as flags with their resolved values: `--a 1` and `--b 2`."""
        parts = [self.options[name].text(self[name]) for name in names]
        return " and ".join(parts) if len(parts) < 3 else ", ".join(parts[:-1]) + " and " + parts[-1]

    def __getitem__(self, name: str) -> Any:
        section, _, key = name.partition(".")
        return getattr(getattr(self.resolved, section), key)

    def is_set(self, name: str) -> bool:
        """Return whether the setting differs from the schema's default, as the user gave it."""
        section, _, key = name.partition(".")
        return bool(getattr(getattr(self.raw, section), key) != self.options[name].default)

    @property
    def iterations_chosen(self) -> bool:
        """Return whether --train-iters was set to something else than what follows from --train-samples."""
        chosen = self.raw.batch.train_iters
        without = dataclasses.replace(self.raw, batch=dataclasses.replace(self.raw.batch, train_iters=None))
        return chosen is not None and chosen != self.derive(without, self.world).batch.train_iters


Rule = Callable[[ConfigCheck], Iterator[Problem]]


@dataclass(frozen=True)
class Rules:
    """The rules of one section.

    A rule answers with its problems. It keeps silent about settings that are missing or out of their range, since other rules
    speak of those, so that each mistake is reported once.

    every_run, pretraining, tasks: none of these touches the disk. disk: those that do. remarks: what was asked for and has no
    effect, a line each.
    """

    every_run: tuple[Rule, ...] = ()
    pretraining: tuple[Rule, ...] = ()
    tasks: tuple[Rule, ...] = ()
    disk: tuple[Rule, ...] = ()
    remarks: tuple[Callable[[ConfigCheck], Iterator[str]], ...] = ()


def missing(c: ConfigCheck, names: Sequence[str], other: str = "") -> Iterator[Problem]:
    """Yield a problem for each of these settings that is open. other: what could be given instead, in words."""
    for name in names:
        if c[name] in (None, ()) and name not in c.invalid:
            yield Problem(f"`{c.flag(name)}`{other}", "is missing, and has no default")


def needs(c: ConfigCheck, names: Collection[str], other: str) -> Iterator[Problem]:
    """Yield a problem for each of these settings that is set without the one that it goes with."""
    for name in names:
        if c.is_set(name) and c[other] is None and other not in c.invalid:
            yield Problem(c.flag_text(name), f"needs `{c.flag(other)}`")


def exclusive(c: ConfigCheck, *names: str) -> Iterator[Problem]:
    """Yield a problem where all of these settings are on."""
    if all(c[name] for name in names):
        yield Problem(c.flag_text(*names), "exclude each other; give one of them")


def divisors(n: int, limit: int = 8) -> str:
    """The divisors of n as text, the smallest `limit` of them."""
    found = [d for d in range(1, n + 1) if n % d == 0] if n <= 65536 else []
    return ", ".join(map(str, found[:limit])) + (", ..." if len(found) > limit else "")
