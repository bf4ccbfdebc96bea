"""Start and end every program so that expected errors print one line instead of a traceback.

    with loading():
        import torch

    if __name__ == "__main__":
        sys.exit(run_main(main))

A program imports this before anything else. This file needs only the standard library and is valid Python 3.6, since the error
to report may be that the interpreter is too old, or that a dependency is not installed.
"""

import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from megatron.launch.packages import EXTRAS, REQUIRED, install_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    ErrorClasses = type[Exception] | tuple[type[Exception], ...]

MIN_PYTHON = (3, 11)
INTERRUPTED = 128 + signal.SIGINT  # exit status, as shells define it


@contextmanager
def loading() -> "Iterator[None]":
    """Guard the imports in the block: if Python is too old or a package is missing, print a line and raise SystemExit.

    Ctrl-C ends the program silently, with status 130.
    """
    check_python()
    # Otherwise torch's C++ code adds sixteen lines of warning to the line that reports the end of another rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    ends_quietly = "TORCHELASTIC_RUN_ID" in os.environ and not is_first_process()
    if ends_quietly:  # SIGTERM then follows from an error that rank 0 reports; torchrun lists ranks with other statuses than 0
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    try:
        yield
    except ModuleNotFoundError as error:
        exit_with_error(missing_package(error) or _raise(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        if ends_quietly:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_main(
    main: "Callable[..., int]",
    *arguments: object,
    wrong: "ErrorClasses" = (),
    failed: "ErrorClasses" = (),
    **named: object,
) -> int:
    """Run `main`, and return its exit status. Expected errors are printed in one line; others end with a traceback.

    If the reader of the output closes it early, as `head` does, the program ends silently with the status of SIGPIPE.

    Args:
        main: function that runs the program.
        arguments: positional arguments of `main`.
        wrong: expected classes of errors in the program's input; exit status 2.
        failed: expected classes of errors during its work; exit status 1.
        named: keyword arguments of `main`.

    Returns:
        The exit status, which is `128 + SIGINT` after Ctrl-C.
    """
    check_python()
    # Imported here, since these modules need a newer Python than this file.
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
    """End the program with a line and status 2 if Python is older than the package needs."""
    if sys.version_info < MIN_PYTHON:
        needed, found = (".".join(map(str, version[:3])) for version in (MIN_PYTHON, sys.version_info))
        exit_with_error(f"Python {needed} or newer is needed, and {sys.executable} is {found}: {activation_command()}")


def missing_package(error: ModuleNotFoundError) -> str:
    """Return the message for a dependency that is not installed; an empty text if the module is no dependency."""
    name = (error.name or "").split(".")[0]
    if name not in REQUIRED and name not in EXTRAS:
        return ""
    advice = activation_command() if name in REQUIRED else f"run `{install_command(name)}`"
    return f"{name} is not installed for {sys.executable}: {advice}"


def activation_command() -> str:
    """Return the advice on how to activate the environment `.venv` of this checkout, or to create it first."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    script = os.path.join(root, ".venv", "bin", "activate")
    relative = os.path.relpath(script)
    activate = f"`source {script if relative.startswith(os.pardir) else relative}`"
    return f"run {activate} first" if os.path.exists(script) else f"run `make install` first, and then {activate}"


def exit_with_error(message: str) -> NoReturn:
    """End the program with status 2; only the first process prints the message."""
    if is_first_process():
        sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


def is_first_process() -> bool:
    """Return whether this is the first process that the launcher started, which prints for all."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) in ("", "0")


def _raise(error: Exception) -> NoReturn:
    """Raise an error, as an expression."""
    raise error
