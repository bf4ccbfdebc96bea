"""Give chat templates Jinja's sandbox with transformers' globals, filters and tags, so that they write the same text.

Imported only where a template is compiled, in the process of `chat_render`.
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

MIN_JINJA = (3, 1, 6)  # earlier sandboxes have known ways out


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment in which a chat template is compiled. ValueError for a jinja2 whose sandbox is not safe."""

    def __init__(self) -> None:
        check_version(jinja2.__version__)
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        self.filters["tojson"] = tojson
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        self.globals |= {"dict": PlainDict(), "namespace": PlainNamespace}


def check_version(installed: str) -> None:
    """Raise ValueError for a version of jinja2 whose sandbox has known ways out."""
    if tuple(int(part) for part in installed.split(".")[:3] if part.isdigit()) < MIN_JINJA:
        least = ".".join(map(str, MIN_JINJA))
        raise ValueError(f"jinja2 {installed} is too old for strangers' templates, {least} is not: {install_command('jinja2')}")


class GenerationTag(Extension):
    """The tag around an assistant's words, which matters only to training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """Return what is between the tag and its end, as it is."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("as_it_is"), [], [], body).set_lineno(line)

    def as_it_is(self, caller: Callable[[], str]) -> str:
        """Return the text inside of the tag."""
        return caller()


class PlainNamespace(Namespace):
    """A namespace of variables that holds no name which begins with an underscore."""

    def __init__(*args: Any, **named: Any) -> None:
        self, args = args[0], args[1:]
        held = dict(*args, **named)
        for name in held:
            PlainNamespace.check(name)
        Namespace.__init__(self, held)

    def __setitem__(self, name: str, value: Any) -> None:
        PlainNamespace.check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def check(name: Any) -> None:
        """Raise SecurityError for a name that begins with an underscore."""
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"{name!r} cannot be stored in a namespace")


class PlainDict:
    """The type `dict` with what templates may do with it."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        """Return `dict` of the arguments."""
        return dict(*args, **named)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Return `dict.fromkeys` of the arguments."""
        return dict.fromkeys(*args)


def raise_exception(message: str) -> None:
    """Let a template refuse a conversation."""
    raise TemplateError(message)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Write a value as JSON; unlike jinja's own filter without HTML's escapes.

    Args:
        value: the value.
        ensure_ascii: escape all characters beyond ASCII.
        indent: see `json.dumps`.
        separators: see `json.dumps`.
        sort_keys: sort the fields by name.
    """
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(form: str) -> str:
    """Return the current time in a format of `strftime`."""
    return datetime.now().strftime(form)
