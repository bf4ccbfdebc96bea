"""Renders a chat template in a process of its own: `python -m megatron.serving.chat_render`, started by `chat_template`.

A template is a stranger's program. Jinja's sandbox keeps it from reading files, but neither from running for ever nor from
filling the memory; a process can be given a limit of memory, and ended. Globals, filters and tags are those of transformers, so
that templates give the same text.

Reads JSON lines. The first holds the template, the special tokens and how long a text may be; each of the others one
conversation. Writes a line for each: {"text": ...} or {"error": ...}.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

MAX_ERROR = 1000  # characters
MAX_MEMORY = 512 << 20  # bytes of address space
MIN_JINJA = (3, 1, 6)  # earlier sandboxes have known ways out


def compiled(source: str) -> Any:
    """Return the template; an exception of jinja2's for one that is none."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    from megatron.launch.packages import how_to_install

    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if version < MIN_JINJA:
        least = ".".join(map(str, MIN_JINJA))
        raise ValueError(
            f"jinja2 {jinja2.__version__} is too old for strangers' templates, {least} is not: {how_to_install('jinja2')}"
        )

    class Generation(Extension):
        """The tag around an assistant's words, which matters only to training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("as_it_is"), [], [], body).set_lineno(line)

        def as_it_is(self, caller: Callable[[], str]) -> str:
            return caller()

    class PlainNamespace(Namespace):
        """Holds no name that begins with an underscore."""

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
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"{name!r} cannot be stored in a namespace")

    class PlainDict:
        """What templates may do with `dict`."""

        def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
            return dict(*args, **named)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.globals |= {"dict": PlainDict(), "namespace": PlainNamespace}
    return environment.from_string(source)


def rendered(template: Any, tokens: dict[str, str], asked: dict[str, Any], longest: int) -> str:
    """Return the text of a conversation; ValueError for one of more than `longest` characters."""
    pieces, length = [], 0
    for piece in template.generate(**{**tokens, **asked}):
        pieces.append(piece)
        length += len(piece)
        if length > longest:
            raise ValueError(f"its text is longer than {longest} characters")
    return "".join(pieces)


def answer(work: Callable[[], str]) -> str:
    """Return the line that says what came of some work. The template's own errors are text for the client."""
    try:
        found = {"text": work()}
    except MemoryError:
        found = {"error": "it needs too much memory"}
    except Exception as error:  # whatever a template brings about
        found = {"error": str(error)[:MAX_ERROR] or type(error).__name__}
    return json.dumps(found)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    about = json.loads(sys.stdin.readline())
    templates: list[Any] = []

    def compile_template() -> str:
        templates.append(compiled(about["template"]))
        return ""

    print(answer(compile_template), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(answer(partial(rendered, templates[0], about["tokens"], asked, about["longest"])), flush=True)


if __name__ == "__main__":
    main()
