"""What is wrong with a configuration: every mistake of a command at once, each in words a person can act on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Problem:
    """One mistake.

    what: the flags with their values, or the file and key, between backticks.
    rule: what is wrong with them; continues the sentence that `what` begins.
    legal: what would be right; empty where the rule says it.
    ranks: where the number of processes is wrong, one that would be right; else 0.
    on_disk: it was found on this host's disk, so that other hosts may not have it.
    """

    what: str
    rule: str
    legal: str = ""
    ranks: int = 0
    on_disk: bool = False

    def __str__(self) -> str:
        return f"{self.what} {self.rule}" + (f"; legal: {self.legal}" if self.legal else "")


class ConfigError(Exception):
    """A configuration that cannot run, with all its mistakes. Programs print it and exit with status 2."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(str(p) for p in self.problems))

    @property
    def on_disk(self) -> bool:
        """Whether every mistake was found on this host's disk, so that other ranks may see none."""
        return all(problem.on_disk for problem in self.problems)


def found_on_disk(problems: Sequence[Problem]) -> list[Problem]:
    """Return the same problems, marked as found on this host's disk."""
    return [replace(problem, on_disk=True) for problem in problems]
