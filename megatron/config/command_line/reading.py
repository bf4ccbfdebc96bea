"""Collect the settings of one source, a command line or a file, with all mistakes in it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.config.command_line.other_flags.other_frameworks import CALLED, HOW_LONG
from megatron.config.command_line.other_flags.table import VALUE, OtherFlag
from megatron.config.command_line.spelling import TAKES_VALUE, Spelling, is_flag, normalize_flag, spellings
from megatron.config.command_line.values import parse_value
from megatron.config.errors import Problem
from megatron.config.option import Option

BELONGS = "belongs to "  # begins the message for a flag of a feature that is not available


@dataclass
class Reading:
    """Settings of one source, as far as it has been read. Settings are named by `section.field`.

    Attributes:
        values: the settings.
        fallbacks: flags that hold only when nothing else, in this source or another, sets their field.
        spelled: the flag or key that gave each setting, as the user spelled it.
        notes: lines on what was read differently from how it was typed.
        problems: mistakes.
        invalid: settings whose value could not be read.
        suggested: settings that an unknown flag seems to mean; that they are missing is not reported as well.
        broken: tables could not be read, so that settings are missing through no mistake of their own.
    """

    values: dict[str, Any] = field(default_factory=dict)
    fallbacks: dict[str, Spelling] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    invalid: set[str] = field(default_factory=set)
    suggested: set[str] = field(default_factory=set)
    broken: bool = False

    def assign(self, option: Option, value: Any, how: str) -> None:
        """Set a value. Two spellings of one setting that disagree are a mistake; of two equal ones the last wins.

        Args:
            option: the setting.
            value: its value, of the field's type.
            how: the flag or key as the user spelled it.
        """
        before = self.values.get(option.name, value)
        if before != value and self.spelled[option.name] != how:
            both = f"`{self.spelled[option.name]}` and `{how}`"
            self.problems.append(Problem(both, "set the same thing to different values"))
        self.values[option.name] = value
        self.spelled[option.name] = how

    def record_unreadable(self, option: Option, what: str, rule: str) -> None:
        """Record a value that cannot be read.

        Args:
            option: the setting.
            what: the flag or key with the value, for the message.
            rule: the mistake.
        """
        self.problems.append(Problem(what, rule))
        self.invalid.add(option.name)

    def finish(self) -> Reading:
        """Finish at the end of the source: merge mistakes of one feature, and those of one cause. Returns self."""
        self.problems = merge_by_feature(self.problems)
        self.invalid |= self.suggested - self.values.keys()
        return self

    def record_unknown(self, what: str, rule: str) -> None:
        """Record an unknown flag or key, and the settings that the message `rule` suggests instead."""
        self.problems.append(Problem(what, rule))
        words = re.findall(r"--[a-z0-9-]+", rule) if rule.startswith((CALLED, HOW_LONG)) else []
        words += rule.partition("; did you mean ")[2].rstrip("?").split(" or ")  # keys of a file have no dashes before them
        named = (spellings().get("--" + word.lstrip("-")) for word in words)
        self.suggested |= {spelling.option.name for spelling in named if spelling}

    def take_other(self, row: OtherFlag, typed: str, values: Sequence[str], where: str = "") -> None:
        """Take a flag that sets no field: as the flags that replace it, as a note, or as a mistake.

        Args:
            row: the flag's row in the tables.
            typed: the flag or key as the user spelled it.
            values: the words after it.
            where: ` in FILE` for the key of a file, for messages.
        """
        whole = " ".join([typed, *values]) + where
        if row.means and row.takes == "1" and not values:
            self.problems.append(Problem(f"`{typed}`{where}", "needs a value after it"))
        elif row.means:
            words = [values[0] if word == VALUE else word for word in row.means]
            self.notes.append(f"{whole} is read as {' '.join(words)}")
            while words:
                spelling = dataclasses.replace(spellings()[normalize_flag(words.pop(0))], flag=typed)
                following = leading_values(words)
                del words[: len(following)]
                self.take(spelling, following)
        elif row.accepts(values):
            why = "it asks for nothing that is not there" if row.refused else row.text
            self.notes.append(f"{whole} changes nothing: {why}")
        elif row.legal and not row.refused:
            self.problems.append(Problem(f"`{whole}`", f"is not available: {row.text}", " or ".join(row.legal)))
        else:
            self.problems.append(Problem(f"`{whole if row.legal else typed + where}`", row.text))

    def take(self, spelling: Spelling, words: Sequence[str]) -> None:
        """Set the value of a flag from the words after it, or record that they are not a legal one."""
        option = spelling.option
        if spelling.is_fallback:  # decided when all sources have been read
            self.fallbacks[option.name] = spelling
            return
        if spelling.value is not TAKES_VALUE:
            self.assign(option, spelling.value, spelling.flag)
            return
        if not words and option.bare is not None:
            words = [option.bare]
        if option.many and option.kind is int:
            words = _without_brackets(words)
        try:
            values = [parse_value(option, word) for word in words]
        except ValueError as error:
            self.record_unreadable(option, f"`{' '.join([spelling.flag, *words])}`", str(error))
            return
        self.assign(option, tuple(values) if option.many else values[0], spelling.flag)


def merge_by_feature(problems: Sequence[Problem]) -> list[Problem]:
    """Merge the problems of flags that belong to the same unavailable feature into one that names all of them."""
    merged: dict[str, list[str]] = {}
    for problem in problems:
        merged.setdefault(problem.rule if problem.rule.startswith(BELONGS) else str(problem), []).append(problem.what)
    rest = []
    for problem in problems:
        same = list(dict.fromkeys(merged.pop(problem.rule, ())))
        if len(same) > 1:
            what = f"{', '.join(same[:-1])} and {same[-1]}"
            rest.append(Problem(what, "belong to " + problem.rule.removeprefix(BELONGS)))
        elif same or not problem.rule.startswith(BELONGS):
            rest.append(problem)
    return rest


def leading_values(words: Sequence[str]) -> list[str]:
    """Return the words before the next flag."""
    end = next((i for i, word in enumerate(words) if is_flag(word)), len(words))
    return list(words[:end])


def _without_brackets(words: Sequence[str]) -> Sequence[str]:
    """Split numbers as YAML files hold them, `[384 384 97656250]` in one word or several, into one word each."""
    text = " ".join(words)
    return text[1:-1].replace(",", " ").split() if text.startswith("[") and text.endswith("]") else words
