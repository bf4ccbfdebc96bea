"""Render a chat template in a process of its own: `python -m megatron.serving.chat_render`, started by `chat_template`.

A template is a stranger's program. Jinja's sandbox (`chat_sandbox`) keeps it from reading files, but neither from running for
ever nor from filling the memory; a process can be given a limit of memory, and ended.

Reads JSON lines. The first holds the template, the special tokens and how long a text may be; each of the others one
conversation. Writes a line for each: {"text": ...} or {"error": ...}.
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


def compiled(source: str) -> Any:
    """Return the template; an exception of jinja2's for one that is none."""
    from megatron.serving.chat_sandbox import ChatEnvironment  # here: what is wrong with jinja2 is an answer too

    return ChatEnvironment().from_string(source)


def rendered(template: Any, tokens: dict[str, str], asked: dict[str, Any], longest: int) -> str:
    """Return the text of a conversation.

    Args:
        template: compiled by `compiled`.
        tokens: special tokens that it may name, such as bos_token.
        asked: its variables, the messages among them.
        longest: the most characters of the text.

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
    """Return the line that holds the text which some work makes, or its error. A template's own errors are for the client."""
    try:
        found = {"text": work()}
    except MemoryError:
        found = {"error": "it needs too much memory"}
    except Exception as error:  # whatever a template brings about
        found = {"error": str(error)[:MAX_ERROR] or type(error).__name__}
    return json.dumps(found)


def main() -> None:
    # A stranger's program that crashes leaves no image of the memory behind.
    """Answer the lines of stdin, one by one, under limits of memory."""
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
