"""Jinja's sandbox with transformers' globals, filters and tags for chat templates, so that they write the same text as there.

Only the process of `chat_render`, which compiles templates, imports this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from megatron.launch.packages import install_command

MIN_JINJA = (3, 1, 6)  # earlier versions have known sandbox escapes


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment in which a chat template is compiled; ValueError if jinja2 is too old for a safe sandbox."""

    def __init__(self) -> None:
        check_version(jinja2.__version__)
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        self.filters["tojson"] = tojson
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        self.globals |= {"dict": PlainDict(), "namespace": PlainNamespace}


def check_version(installed: str) -> None:
    """Raise ValueError for a version of jinja2 with known sandbox escapes."""
    if tuple(int(part) for part in installed.split(".")[:3] if part.isdigit()) < MIN_JINJA:
        minimum = ".".join(map(str, MIN_JINJA))
        raise ValueError(f"jinja2 {installed} has an unsafe sandbox; {minimum} or later is needed: {install_command('jinja2')}")


class GenerationTag(Extension):
    """The tag `generation` around an assistant's reply, which only training uses; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """Return a node for the statements between the tag and its end."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("unchanged"), [], [], body).set_lineno(line)

    def unchanged(self, caller: Callable[[], str]) -> str:
        """Return the text inside of the tag."""
        return caller()


class PlainNamespace(Namespace):
    """Jinja's namespace, without names that begin with an underscore: such as __class__ could lead out of the sandbox."""

    def __init__(*args: Any, **keywords: Any) -> None:
        self, args = args[0], args[1:]
        variables = dict(*args, **keywords)
        for name in variables:
            PlainNamespace.check(name)
        Namespace.__init__(self, variables)

    def __setitem__(self, name: str, value: Any) -> None:
        PlainNamespace.check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def check(name: Any) -> None:
        """Raise SecurityError for a name that begins with an underscore."""
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"{name!r} cannot be stored in a namespace")


class PlainDict:
    """A replacement for the type `dict`, with only the operations that templates need."""

    def __call__(self, *args: Any, **keywords: Any) -> dict[Any, Any]:
        """Return `dict` of the arguments."""
        return dict(*args, **keywords)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Return `dict.fromkeys` of the arguments."""
        return dict.fromkeys(*args)


def raise_exception(message: str) -> None:
    """Raise TemplateError, by which a template refuses a conversation."""
    raise TemplateError(message)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Return a value as JSON, without the HTML escapes of jinja's own filter.

    Args:
        value: the value.
        ensure_ascii: escape all non-ASCII characters.
        indent: as for `json.dumps`.
        separators: as for `json.dumps`.
        sort_keys: sort the fields by name.
    """
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(format: str) -> str:
    """Return the current time in a format of `strftime`."""
    return datetime.now().strftime(format)
