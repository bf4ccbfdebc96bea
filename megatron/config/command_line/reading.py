"""Collect the settings of one source, which is a command line or a file, and all mistakes in it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.config.command_line.other_flags.other_frameworks import CALLED, LENGTH_ADVICE
from megatron.config.command_line.other_flags.table import VALUE, OtherFlag
from megatron.config.command_line.spelling import TAKES_VALUE, Spelling, is_flag, normalize_flag, spellings
from megatron.config.command_line.values import parse_value
from megatron.config.errors import Problem
from megatron.config.option import Option

BELONGS = "belongs to "  # the start of the message for a flag of an unavailable feature; it recognizes these messages


@dataclass
class Reading:
    """Settings that have been read so far from one source. They are keyed by `section.field`.

    Attributes:
        values: value of each setting.
        fallbacks: flags that apply only if nothing else, in this source or another, sets their field.
        spelled: the flag or key that gave each setting, as the user spelled it.
        notes: messages about flags that were interpreted differently from how they were typed, or that have no effect.
        problems: mistakes.
        invalid: settings whose value could not be read.
        suggested: settings that unknown flags probably meant; they are not reported as missing as well.
        broken: the file, or one of its tables, could not be read; missing settings must then not be reported, because it may
            contain them.
    """

    values: dict[str, Any] = field(default_factory=dict)
    fallbacks: dict[str, Spelling] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    invalid: set[str] = field(default_factory=set)
    suggested: set[str] = field(default_factory=set)
    broken: bool = False

    def assign(self, option: Option, value: Any, spelled: str) -> None:
        """Set a value. It is a mistake if another spelling has set a different value; if the same one has, the last value wins.

        Args:
            option: the setting.
            value: its value, of the field's type.
            spelled: the flag or key as the user spelled it.
        """
        before = self.values.get(option.name, value)
        if before != value and self.spelled[option.name] != spelled:
            both = f"`{self.spelled[option.name]}` and `{spelled}`"
            self.problems.append(Problem(both, "set the same thing to different values"))
        self.values[option.name] = value
        self.spelled[option.name] = spelled

    def record_unreadable(self, option: Option, what: str, rule: str) -> None:
        """Record that the value of a setting cannot be read.

        Args:
            option: the setting.
            what: the flag or key with the value, for the message.
            rule: the mistake.
        """
        self.problems.append(Problem(what, rule))
        self.invalid.add(option.name)

    def finish(self) -> Reading:
        """Finish after the last flag or key: merge the problems of one feature, and settle `invalid`. Returns self."""
        self.problems = merge_by_feature(self.problems)
        self.invalid |= self.suggested - self.values.keys()
        return self

    def record_unknown(self, what: str, rule: str) -> None:
        """Record an unknown flag or key, and the settings that its message `rule` suggests."""
        self.problems.append(Problem(what, rule))
        words = re.findall(r"--[a-z0-9-]+", rule) if rule.startswith((CALLED, LENGTH_ADVICE)) else []
        words += rule.partition("; did you mean ")[2].rstrip("?").split(" or ")
        found = (spellings().get("--" + word.lstrip("-")) for word in words)  # suggested keys of a file have no dashes
        self.suggested |= {spelling.option.name for spelling in found if spelling}

    def take_other(self, row: OtherFlag, typed: str, values: Sequence[str], where: str = "") -> None:
        """Handle a flag that sets no field: apply the flags that replace it, or record a note or a mistake.

        Args:
            row: the flag's row in the tables.
            typed: the flag or key as the user spelled it.
            values: its values, as text.
            where: end of the messages about a key of a file, ` in FILE`.
        """
        flag_and_values = " ".join([typed, *values]) + where
        if row.means and row.takes == "1" and not values:
            self.problems.append(Problem(f"`{typed}`{where}", "needs a value after it"))
        elif row.means:
            words = [values[0] if word == VALUE else word for word in row.means]
            self.notes.append(f"{flag_and_values} is read as {' '.join(words)}")
            while words:
                spelling = dataclasses.replace(spellings()[normalize_flag(words.pop(0))], flag=typed)
                following = leading_values(words)
                del words[: len(following)]
                self.take(spelling, following)
        elif row.accepts(values):
            why = "it turns on nothing that is unavailable" if row.refused else row.text
            self.notes.append(f"{flag_and_values} changes nothing: {why}")
        elif row.legal and not row.refused:
            self.problems.append(Problem(f"`{flag_and_values}`", f"is not available: {row.text}", " or ".join(row.legal)))
        else:
            self.problems.append(Problem(f"`{flag_and_values if row.legal else typed + where}`", row.text))

    def take(self, spelling: Spelling, words: Sequence[str]) -> None:
        """Set the field of a flag to the value that the words after it give, or record that they are not legal."""
        option = spelling.option
        if spelling.is_fallback:  # applied after all sources have been read, if none of them sets the field
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
    """Merge the problems of all flags that belong to the same unavailable feature into one, which names all of them."""
    flags_by_rule: dict[str, list[str]] = {}
    for problem in problems:
        flags_by_rule.setdefault(problem.rule if problem.rule.startswith(BELONGS) else str(problem), []).append(problem.what)
    merged = []
    for problem in problems:
        flags = list(dict.fromkeys(flags_by_rule.pop(problem.rule, ())))  # empty if merged already, or not of a feature
        if len(flags) > 1:
            what = f"{', '.join(flags[:-1])} and {flags[-1]}"
            merged.append(Problem(what, "belong to " + problem.rule.removeprefix(BELONGS)))
        elif flags or not problem.rule.startswith(BELONGS):
            merged.append(problem)
    return merged


def leading_values(words: Sequence[str]) -> list[str]:
    """Return the words before the next flag."""
    end = next((i for i, word in enumerate(words) if is_flag(word)), len(words))
    return list(words[:end])


def _without_brackets(words: Sequence[str]) -> Sequence[str]:
    """Remove the brackets of a YAML list, `[384 384 97656250]` in one word or several, and return one word per number."""
    text = " ".join(words)
    return text[1:-1].replace(",", " ").split() if text.startswith("[") and text.endswith("]") else words
