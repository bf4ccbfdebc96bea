"""Write a run's configuration as JSON, for checkpoints, and as TOML, for users to edit; read the JSON."""

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
    """Return the configuration as nested dictionaries of sections and fields that `json.dumps` accepts."""
    return {
        name: {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        for name, fields in dataclasses.asdict(config).items()
    }


def from_json(data: Mapping[str, Any]) -> RunSettings:
    """Read the settings that `to_json` wrote. Absent sections and fields get their defaults.

    Raises:
        ConfigError: a section or field is unknown to this version, or a value has the wrong type; it lists all such mistakes.
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
        read = {}
        for key, value in values.items():
            if key not in defaults:
                problems.append(Problem(f"`{name}.{key}` of the saved configuration", "is not known to this version"))
                continue
            option = by_name().get(f"{name}.{key}")
            if option is None:  # a field without a flag has no type to check; JSON turns its tuples into lists
                read[key] = tuple(value) if isinstance(value, list) else value
                continue
            try:
                read[key] = value if value is None else coerce(option, value)
            except ValueError as error:
                problems.append(Problem(f"`{name}.{key} = {value!r}` of the saved configuration", str(error)))
        built[name] = sections()[name](**read)
    if problems:
        raise ConfigError(problems)
    return RunSettings(**built)


def to_toml(config: RunSettings) -> str:
    """Return this configuration as the text of a TOML file for `--config`, without settings that are None or have no flag."""
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
        # TOML strings have JSON's escapes. DEL must be escaped too: TOML forbids it in a string, and json.dumps leaves it.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
