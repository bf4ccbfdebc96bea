"""Render chat templates in a separate process: `python -m megatron.serving.chat_render`, started by `chat_template`.

A template is an untrusted program. Jinja's sandbox (`chat_sandbox`) prevents it from reading files, but not from running for
ever or filling the memory; so it runs in a process with a memory limit, which can be killed.

The process reads JSON lines. The first one holds the template, the special tokens and the maximum length of a text; each of the
others one conversation. It writes a line for each: {"text": ...} or {"error": ...}.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

MAX_ERROR = 1000  # characters
MAX_MEMORY = 512 << 20  # bytes of address space


def compile_source(source: str) -> Any:
    """Compile a template; raises jinja2's exceptions for an invalid one."""
    from megatron.serving.chat_sandbox import ChatEnvironment  # imported here, so that its errors become answers

    return ChatEnvironment().from_string(source)


def render(template: Any, tokens: dict[str, str], asked: dict[str, Any], longest: int) -> str:
    """Return the text of a conversation.

    Args:
        template: the result of `compile_source`.
        tokens: special tokens that the template may use, such as bos_token.
        asked: the template's variables, such as the messages.
        longest: maximum number of characters of the text.

    Raises:
        ValueError: the text is longer.
    """
    pieces, length = [], 0
    for piece in template.generate(**{**tokens, **asked}):
        pieces.append(piece)
        length += len(piece)
        if length > longest:
            raise ValueError(f"its text is longer than {longest} characters")
    return "".join(pieces)


def answer(work: Callable[[], str]) -> str:
    """Return the line with the text that `work` returns, or its error; the errors of a template are sent to the client."""
    try:
        found = {"text": work()}
    except MemoryError:
        found = {"error": "it needs too much memory"}
    except Exception as error:  # templates can raise any exception
        found = {"error": str(error)[:MAX_ERROR] or type(error).__name__}
    return json.dumps(found)


def main() -> None:
    """Answer the lines of stdin, one by one, with a memory limit."""
    # Without core dumps, which would write the conversation to the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    about = json.loads(sys.stdin.readline())
    templates: list[Any] = []

    def compile_template() -> str:
        templates.append(compile_source(about["template"]))
        return ""

    print(answer(compile_template), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(answer(partial(render, templates[0], about["tokens"], asked, about["longest"])), flush=True)


if __name__ == "__main__":
    main()
