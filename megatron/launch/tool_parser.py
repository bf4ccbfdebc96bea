"""Parse the command line of a tool, and report a mistake in one line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from megatron.launch.entry import is_first_process
from megatron.launch.exit_report import write_error_file

MAX_DIGITS = 18  # digits of an integer; any with so few fits into 64 bits
MAX_MESSAGE = 400  # characters of a message, since a value on the command line may be very long


class ToolParser(argparse.ArgumentParser):
    """argparse's parser, without the long usage text that it prints before an error message."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake in the command line, write it to torchrun's error file too, and exit with status 2."""
        shown = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}..."
        if is_first_process():
            write_error_file(f"error: {shown}")
        self.exit(2, f"error: {shown}\n{self.prog}: --help lists its arguments\n")


def non_empty_name(text: str) -> str:
    """Return a non-empty name of a file, a directory or a prefix: the `type=` of an argument."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def non_empty_path(text: str) -> Path:
    """Return a path, the `type=` of an argument. An empty one is refused, since it would mean the current directory."""
    return Path(non_empty_name(text))


def non_negative_int(text: str) -> int:
    """Return an integer that is 0 or greater: the `type=` of an argument."""
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        raise argparse.ArgumentTypeError(f"{text[:MAX_DIGITS]!r} is not an integer, 0 or greater")
    return int(text)
