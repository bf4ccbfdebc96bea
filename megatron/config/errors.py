"""Types for the mistakes in a configuration. All mistakes of a command are collected and reported together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration.

    Attributes:
        what: the subject of the message: flags with their values, or file and key, between backticks.
        rule: the predicate of the message, as in "`--num-layers 0`" "must be greater than 0".
        legal: the legal values; empty if the rule states them.
        ranks: a number of processes that would be right, if the number of processes is wrong; else 0.
        on_disk: the mistake was found on this host's disk, so other hosts may not have it.
    """

    what: str
    rule: str
    legal: str = ""
    ranks: int = 0
    on_disk: bool = False

    def __str__(self) -> str:
        return f"{self.what} {self.rule}" + (f"; legal: {self.legal}" if self.legal else "")


class ConfigError(Exception):
    """Raised for a configuration that cannot run. Contains all its mistakes; programs print them and exit with status 2."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))  # without duplicates: two rules may find the same problem
        super().__init__("\n".join(str(p) for p in self.problems))

    @property
    def on_disk(self) -> bool:
        """True if all mistakes were found on this host's disk, so that ranks on other hosts may find none."""
        return all(problem.on_disk for problem in self.problems)


def mark_on_disk(problems: Sequence[Problem]) -> list[Problem]:
    """Return copies of the problems, marked as found on this host's disk."""
    return [replace(problem, on_disk=True) for problem in problems]
