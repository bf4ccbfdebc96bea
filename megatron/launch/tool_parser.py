"""Parse the command line of a tool, with a line for each mistake."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from megatron.launch.entry import is_first_process
from megatron.launch.exit_report import write_error_file

MAX_DIGITS = 18  # of an integer: what has as many fits into 64 bits
MAX_MESSAGE = 400  # characters of a mistake: a value may be a whole file, by mistake


class ToolParser(argparse.ArgumentParser):
    """argparse's parser, without its usage before each mistake, which fills the screen and hides the mistake."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line, to a launcher too, and exit with status 2."""
        shown = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}..."
        if is_first_process():
            write_error_file(f"error: {shown}")
        self.exit(2, f"error: {shown}\n{self.prog}: --help lists what it takes\n")


def non_empty_name(text: str) -> str:
    """Return the name of a file, a directory or a prefix, as `type=` of an argument. It has at least one letter."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def non_empty_path(text: str) -> Path:
    """Return a path, as `type=` of an argument. An empty one would mean the directory at hand."""
    return Path(non_empty_name(text))


def non_negative_int(text: str) -> int:
    """Return an integer, 0 or greater, as `type=` of an argument."""
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        raise argparse.ArgumentTypeError(f"{text[:MAX_DIGITS]!r} is not an integer, 0 or greater")
    return int(text)
