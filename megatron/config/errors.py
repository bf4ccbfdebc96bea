"""Mistakes in a configuration: all of a command are collected, and each says what to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration.

    Attributes:
        what: the flags with their values, or the file and key, between backticks.
        rule: the fault; continues the sentence that `what` begins, as in "`--num-layers 0`" "must be greater than 0".
        legal: what would be right; empty when the rule says it.
        ranks: a number of processes that would be right, when that is what is wrong; else 0.
        on_disk: the mistake was found on this host's disk, and other hosts may not have it.
    """

    what: str
    rule: str
    legal: str = ""
    ranks: int = 0
    on_disk: bool = False

    def __str__(self) -> str:
        return f"{self.what} {self.rule}" + (f"; legal: {self.legal}" if self.legal else "")


class ConfigError(Exception):
    """A configuration that cannot run, with all its mistakes. Programs print them and exit with status 2."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))  # two rules may find the same one; the first place counts
        super().__init__("\n".join(str(p) for p in self.problems))

    @property
    def on_disk(self) -> bool:
        """True when every mistake was found on this host's disk, so that ranks on other hosts may see none."""
        return all(problem.on_disk for problem in self.problems)


def mark_on_disk(problems: Sequence[Problem]) -> list[Problem]:
    """Return the same problems, marked as found on this host's disk."""
    return [replace(problem, on_disk=True) for problem in problems]
