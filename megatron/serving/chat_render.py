"""Render chat templates in a separate process: `python -m megatron.serving.chat_render`, started by `chat_template`.

A template is an untrusted program. Jinja's sandbox (`chat_sandbox`) prevents it from reading files, but not from running
forever or filling the memory, so it runs in a process with a memory limit that can be killed.

The process reads JSON lines. The first one contains the template, the special tokens and the maximum length of a text; each
later one contains one conversation. For each line it writes one: {"text": ...} or {"error": ...}.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

MAX_ERROR_CHARACTERS = 1000
MAX_MEMORY_BYTES = 512 << 20  # of address space


def compile_source(source: str) -> Any:
    """Compile a template; raises jinja2's exceptions for an invalid one."""
    from megatron.serving.chat_sandbox import ChatEnvironment  # imported here, so that an ImportError is a reply, too

    return ChatEnvironment().from_string(source)


def render(template: Any, tokens: dict[str, str], variables: dict[str, Any], max_characters: int) -> str:
    """Render a conversation as text.

    Args:
        template: the result of `compile_source`.
        tokens: texts of the special tokens that the template may use, such as bos_token.
        variables: the template's other variables, such as the messages.
        max_characters: maximum number of characters of the text.

    Raises:
        ValueError: the text is longer.
    """
    pieces, length = [], 0
    for piece in template.generate(**{**tokens, **variables}):
        pieces.append(piece)
        length += len(piece)
        if length > max_characters:
            raise ValueError(f"its text is longer than {max_characters} characters")
    return "".join(pieces)


def run_safely(function: Callable[[], str]) -> str:
    """Call a function; return the line that replies with its text, or with its error, which is sent to the client."""
    try:
        reply = {"text": function()}
    except MemoryError:
        reply = {"error": "it needs too much memory"}
    except Exception as error:  # templates can raise any exception
        reply = {"error": str(error)[:MAX_ERROR_CHARACTERS] or type(error).__name__}
    return json.dumps(reply)


def main() -> None:
    """Reply to the lines of stdin, one by one, with a memory limit."""
    # No core dumps, since they would write the conversation to the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    settings = json.loads(sys.stdin.readline())
    templates: list[Any] = []

    def compile_template() -> str:
        templates.append(compile_source(settings["template"]))
        return ""

    print(run_safely(compile_template), flush=True)
    for line in sys.stdin:
        variables = json.loads(line)
        print(run_safely(partial(render, templates[0], settings["tokens"], variables, settings["max_characters"])), flush=True)


if __name__ == "__main__":
    main()
