"""Start and end every program, so that it ends in one line where a traceback would help nobody.

    with loading():
        import torch

    if __name__ == "__main__":
        sys.exit(run_main(main))

A program imports this before anything else. So it needs the standard library alone, and reads as Python 3.6 does: what is
wrong may be the interpreter, or that nothing is installed for it.
"""

import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from megatron.launch.packages import EXTRAS, REQUIRED, install_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Kinds = type[Exception] | tuple[type[Exception], ...]

MIN_PYTHON = (3, 11)
INTERRUPTED = 128 + signal.SIGINT  # exit statuses as shells have them


@contextmanager
def loading() -> "Iterator[None]":
    """Import what a program needs. SystemExit, after one line, where this Python is too old or lacks a package.

    Ctrl-C ends the program silently with status 130: there is nothing to say yet.
    """
    check_python()
    # Else torch's C++ part adds a warning of sixteen lines to the one line in which a rank says that another has left.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    quiet = "TORCHELASTIC_RUN_ID" in os.environ and not is_first_process()
    if quiet:  # what ends it now is the first process's mistake, and torchrun reports each that does not end with 0
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    try:
        yield
    except ModuleNotFoundError as error:
        exit_with_error(missing_package(error) or _raise(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        if quiet:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_main(main: "Callable[..., int]", *arguments: object, wrong: "Kinds" = (), failed: "Kinds" = (), **named: object) -> int:
    """Return the exit status of `main` with these arguments, or of what ended it, of which one line is said.

    A reader of its output that leaves early, as `head` does, ends it silently with the status of SIGPIPE. What nobody expects
    still ends in a traceback.

    Args:
        main: the program.
        arguments: positional arguments of `main`.
        wrong: errors in what the program was asked for; exit status 2.
        failed: errors that it met on its way; exit status 1.
        named: named arguments of `main`.

    Returns:
        The exit status; `128 + SIGINT` after Ctrl-C.
    """
    check_python()
    # Imported here, since these modules need a newer Python than this one.
    from megatron.files.side import piped_streams
    from megatron.launch.errors import JobError
    from megatron.launch.memory import out_of_memory_message

    with piped_streams():
        try:
            return main(*arguments, **named)
        except KeyboardInterrupt:
            if is_first_process():
                print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except wrong as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except failed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except JobError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.status
        except ModuleNotFoundError as error:
            exit_with_error(missing_package(error) or _raise(error))
        except Exception as error:
            print(f"error: {out_of_memory_message(error) or _raise(error)}", file=sys.stderr)
            return 1


def check_python() -> None:
    """End the program with status 2, after one line, where Python is older than what the package needs."""
    if sys.version_info < MIN_PYTHON:
        needed, found = (".".join(map(str, version[:3])) for version in (MIN_PYTHON, sys.version_info))
        exit_with_error(f"Python {needed} or newer is needed, and {sys.executable} is {found}: {activation_command()}")


def missing_package(error: ModuleNotFoundError) -> str:
    """Return what to say of a package of ours that is not installed; an empty text for any other package."""
    name = (error.name or "").split(".")[0]
    if name not in REQUIRED and name not in EXTRAS:
        return ""
    way = activation_command() if name in REQUIRED else f"run `{install_command(name)}`"
    return f"{name} is not installed for {sys.executable}: {way}"


def activation_command() -> str:
    """Return the words that tell how a shell gets the Python which the project is installed for.

    It is that of the environment `.venv` of this checkout, or of one that has to be made first.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    script = os.path.join(root, ".venv", "bin", "activate")
    near = os.path.relpath(script)
    activate = f"`source {script if near.startswith(os.pardir) else near}`"
    return f"run {activate} first" if os.path.exists(script) else f"run `make install` first, and then {activate}"


def exit_with_error(words: str) -> NoReturn:
    """End the program with status 2, after one line from the first of its processes."""
    if is_first_process():
        sys.stderr.write(f"error: {words}\n")
    sys.exit(2)


def is_first_process() -> bool:
    """Return whether this process speaks for all that a launcher has started, of which the first one does."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) in ("", "0")


def _raise(error: Exception) -> NoReturn:
    """Raise an error from within an expression."""
    raise error
