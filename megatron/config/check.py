"""The view of a configuration that rules are given, and the checks that rules of several sections share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.config.errors import Problem
from megatron.config.option import Option


@dataclass(frozen=True)
class ConfigCheck:
    """A configuration that is being checked. `c["section.field"]` is a setting's resolved value.

    Attributes:
        raw: the `RunSettings` as the user gave them.
        resolved: the same with derived settings filled in, as far as they follow from the others.
        world_size: number of ranks.
        dp: number of data-parallel ranks; None when the layout does not fit the world size.
        options: all options, by `section.field`.
        derive: fills in derived settings for a number of ranks.
        invalid: settings that already have a problem, by `section.field`.
        planning: this is a dry run, which may leave out what a run reads from the disk.
    """

    # Not typed as RunSettings: the schema imports the sections, whose rules import this file.

    raw: Any
    resolved: Any
    world_size: int
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
        """Return whether the user gave the setting a value other than the schema's default."""
        section, _, key = name.partition(".")
        return bool(getattr(getattr(self.raw, section), key) != self.options[name].default)

    @property
    def iterations_chosen(self) -> bool:
        """True when --train-iters was set to something else than what follows from --train-samples."""
        # A resolved run that is checked again, or a saved one, has train_iters beside the samples that it follows from.
        chosen = self.raw.batch.train_iters
        without = dataclasses.replace(self.raw, batch=dataclasses.replace(self.raw.batch, train_iters=None))
        return chosen is not None and chosen != self.derive(without, self.world_size).batch.train_iters


Rule = Callable[[ConfigCheck], Iterator[Problem]]


@dataclass(frozen=True)
class Rules:
    """The rules of one section.

    A rule yields its problems. It ignores settings that are missing or out of their range, which other rules report, so that
    each mistake is reported once. The docstring of a rule states what a legal configuration fulfils.

    Attributes:
        every_run: rules of pretraining and of tasks that do not touch the disk.
        pretraining: further rules of pretraining that do not touch the disk.
        tasks: further rules of tasks/main.py that do not touch the disk.
        disk: rules that look at files.
        remarks: functions that yield a line for each setting that was given and has no effect.
    """

    every_run: tuple[Rule, ...] = ()
    pretraining: tuple[Rule, ...] = ()
    tasks: tuple[Rule, ...] = ()
    disk: tuple[Rule, ...] = ()
    remarks: tuple[Callable[[ConfigCheck], Iterator[str]], ...] = ()


def missing(c: ConfigCheck, names: Sequence[str], other: str = "") -> Iterator[Problem]:
    """Yield a problem for each of these settings that is missing.

    Args:
        c: the configuration.
        names: the settings, by `section.field`.
        other: alternative that could be given instead, for the message.
    """
    for name in names:
        if c[name] in (None, ()) and name not in c.invalid:
            yield Problem(f"`{c.flag(name)}`{other}", "is missing, and has no default")


def needs(c: ConfigCheck, names: Collection[str], other: str) -> Iterator[Problem]:
    """Yield a problem for each of these settings that is set without the one that it depends on.

    Args:
        c: the configuration.
        names: the dependent settings, by `section.field`.
        other: the setting that they depend on.
    """
    for name in names:
        if c.is_set(name) and c[other] is None and other not in c.invalid:
            yield Problem(c.flag_text(name), f"needs `{c.flag(other)}`")


def exclusive(c: ConfigCheck, *names: str) -> Iterator[Problem]:
    """Yield a problem when all of these settings are on."""
    if all(c[name] for name in names):
        yield Problem(c.flag_text(*names), "exclude each other; give one of them")


def divisors(n: int, limit: int = 8) -> str:
    """Return the `limit` smallest divisors of n as text."""
    # n is what a user typed, and trial division of a huge number would not end.
    found = [d for d in range(1, n + 1) if n % d == 0] if n <= 65536 else []
    return ", ".join(map(str, found[:limit])) + (", ..." if len(found) > limit else "")
