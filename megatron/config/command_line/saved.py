"""Write a run's configuration as JSON, for checkpoints, and as TOML, for people to edit; read the JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from megatron.config.command_line.values import coerce
from megatron.config.errors import ConfigError, Problem
from megatron.config.options import by_name
from megatron.config.schema import RunSettings, sections


def to_json(config: RunSettings) -> dict[str, dict[str, Any]]:
    """Return sections and fields as values for `json.dumps`."""
    return {
        name: {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        for name, fields in dataclasses.asdict(config).items()
    }


def from_json(data: Mapping[str, Any]) -> RunSettings:
    """Read the settings that `to_json` wrote. Absent sections and fields have their defaults.

    Raises:
        ConfigError: sections and fields that this version does not know, and values of a wrong type; it holds all of them.
    """
    if not isinstance(data, Mapping):
        raise ConfigError([Problem("the saved configuration", "is not a JSON object")])
    problems: list[Problem] = []
    built: dict[str, Any] = {}
    for name, values in data.items():
        if name not in sections() or not isinstance(values, Mapping):
            problems.append(Problem(f"section `{name}` of the saved configuration", "is not known to this version"))
            continue
        defaults = {f.name: f.default for f in dataclasses.fields(sections()[name])}
        taken = {}
        for key, value in values.items():
            if key not in defaults:
                problems.append(Problem(f"`{name}.{key}` of the saved configuration", "is not known to this version"))
                continue
            option = by_name().get(f"{name}.{key}")
            if option is None:  # no flag sets it, so only `to_json` has written it; JSON has lists in place of tuples
                taken[key] = tuple(value) if isinstance(value, list) else value
                continue
            try:
                taken[key] = value if value is None else coerce(option, value)
            except ValueError as error:
                problems.append(Problem(f"`{name}.{key} = {value!r}` of the saved configuration", str(error)))
        built[name] = sections()[name](**taken)
    if problems:
        raise ConfigError(problems)
    return RunSettings(**built)


def to_toml(config: RunSettings) -> str:
    """Return the text of a file for `--config` that gives this run. Settings that are None are left out."""
    lines: list[str] = []
    for section, values in to_json(config).items():
        lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        for key, value in values.items():
            if value is not None and f"{section}.{key}" in by_name():
                lines.append(f"{key.replace('_', '-')} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        # TOML escapes as JSON does, but for DEL, which it forbids in a string and JSON lets pass.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
