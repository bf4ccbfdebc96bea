"""The view of a configuration that rules take, and checks that the rules of several sections share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.config.errors import Problem
from megatron.config.option import Option


@dataclass(frozen=True)
class ConfigCheck:
    """View of a configuration that is being checked. `c["section.field"]` is the resolved value of a setting.

    Attributes:
        raw: the `RunSettings` as the user gave them.
        resolved: the same settings, with derived ones filled in as far as possible.
        world_size: number of ranks.
        dp: number of data-parallel ranks; None when the layout does not fit the world size.
        options: all options, by `section.field`.
        derive: function that fills in derived settings for a number of ranks.
        invalid: names, `section.field`, of settings for which a problem has been reported.
        planning: the command is a dry run, which may leave out settings that name input files.
    """

    # `raw` and `resolved` are RunSettings. Their type is Any because schema.py imports the sections, which import this file.
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
        """Return the settings as flags with their resolved values, for messages: `--a 1` and `--b 2`."""
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
        """True if the user gave --train-iters, rather than that it was derived from --train-samples."""
        # `raw` may be a resolved or a saved configuration, in which train_iters has been derived before.
        train_iters = self.raw.batch.train_iters
        without = dataclasses.replace(self.raw, batch=dataclasses.replace(self.raw.batch, train_iters=None))
        return train_iters is not None and train_iters != self.derive(without, self.world_size).batch.train_iters


Rule = Callable[[ConfigCheck], Iterator[Problem]]


@dataclass(frozen=True)
class Rules:
    """The rules of one section.

    A rule is a function that yields problems. It ignores settings that are missing or out of range, which are reported
    elsewhere, so that each mistake is reported once. The docstring of a rule states the property of a legal configuration.

    Attributes:
        every_run: rules of pretraining and of tasks that do not touch the disk.
        pretraining: further rules of pretraining that do not touch the disk.
        tasks: further rules of tasks/main.py that do not touch the disk.
        disk: rules that look at files and directories.
        remarks: functions that yield lines for the user, mostly on settings that have no effect.
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
        other: text after the flag in the message, on an alternative to it.
    """
    for name in names:
        if c[name] in (None, ()) and name not in c.invalid:
            yield Problem(f"`{c.flag(name)}`{other}", "is missing, and has no default")


def needs(c: ConfigCheck, names: Collection[str], other: str) -> Iterator[Problem]:
    """Yield a problem for each of these settings that is set although the one that it depends on is not.

    Args:
        c: the configuration.
        names: the dependent settings, by `section.field`.
        other: the setting that they depend on.
    """
    for name in names:
        if c.is_set(name) and c[other] is None and other not in c.invalid:
            yield Problem(c.flag_text(name), f"needs `{c.flag(other)}`")


def exclusive(c: ConfigCheck, *names: str) -> Iterator[Problem]:
    """Yield a problem if all of these settings are on."""
    if all(c[name] for name in names):
        yield Problem(c.flag_text(*names), "exclude each other; give one of them")


def divisors(n: int, limit: int = 8) -> str:
    """Return the `limit` smallest divisors of n as text; empty if n is greater than 65,536."""
    # n comes from the command line, and trial division of a huge number would take too long.
    found = [d for d in range(1, n + 1) if n % d == 0] if n <= 65536 else []
    return ", ".join(map(str, found[:limit])) + (", ..." if len(found) > limit else "")
