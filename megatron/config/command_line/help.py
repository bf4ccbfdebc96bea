"""Build the text of `--help`: all flags by section, each with its default and its legal values."""

from __future__ import annotations

import textwrap

from megatron.config.command_line.other_flags.table import other_flags
from megatron.config.option import Option
from megatron.config.options import options
from megatron.config.schema import sections


def help_text(program: str, *, task: bool = False) -> str:
    """Return the text of `--help`.

    Args:
        program: name of the program.
        task: include the flags of tasks/main.py.
    """
    lines = [f"usage: {program} [--config run.toml] [--flag value ...]", "", "The command:"]
    titles = {"command": "", **{name: (config.__doc__ or "").splitlines()[0] for name, config in sections().items()}}
    if not task:
        del titles["task"]
    for section, title in titles.items():
        if section != "command":
            lines += ["", f"[{section}] {title}"]
        for option in options():
            if option.section == section:
                lines += _describe(option)
    lines += ["", "Flags of Megatron-LM that are read as other flags (with a note):"]
    lines += [f"  {row.flag:<40}  {' '.join(row.means)}" for row in other_flags().values() if row.means]
    ignored = sorted(row.flag for row in other_flags().values() if not row.refused and not row.means)
    lines += ["", "Accepted without effect (a note gives the reason):"]
    lines += textwrap.wrap(", ".join(ignored), 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    lines += ["", "Every other flag of Megatron-LM, 23.06 to Core 0.19, is an error that names the feature it belongs to."]
    lines += ["", "In a TOML file the names in brackets are tables, and keys are the flags without their dashes."]
    return "\n".join(lines) + "\n"


def _describe(option: Option) -> list[str]:
    """Return the lines of the help text for one flag."""
    metavar = option.metavar or {int: "N", float: "X", str: "TEXT", bool: ""}[option.kind]
    argument = f" {metavar} ..." if option.many else f" {metavar}" if metavar else ""
    facts = []
    text, _, derived = option.help.partition(" (default: ")
    if option.choices:
        facts.append("one of " + ", ".join(option.choices))
    if option.kind is not bool and option.default not in (None, ()):
        facts.append(f"default: {option.default}")
    elif derived:
        facts.append(f"default: {derived.removesuffix(')')}")
    facts += [
        f"{flag} means {value}" + (" unless another is given" if flag in option.fallbacks else "")
        for flag, value in option.shortcuts.items()
    ]
    if option.aliases:
        facts.append("also " + ", ".join(option.aliases))
    text = ("turns off: " if option.off_flag else "") + text + (f" ({'; '.join(facts)})" if facts else "")
    head = f"  {option.flag}{argument}"
    wrapped = textwrap.wrap(text, 82, break_on_hyphens=False)
    if len(head) > 36:
        return [head, *(" " * 38 + line for line in wrapped)]
    return [f"{head:<38}{wrapped[0]}", *(" " * 38 + line for line in wrapped[1:])]
