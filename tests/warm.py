"""Forks programs from a process that has imported torch and the package once, for the stand-in of python in `warm_python.py`.

    python tests/warm.py SOCKET

A request is one message: the program's words, environment, directory, umask and ignored signals as a Python literal, and its
three standard streams as descriptors. The program then runs as `python WORDS` would run it, up to its exit status and the end
of the interpreter. The answers are the word "cold" where only a start of its own can do (the stand-in then makes one), or the
number of the process and, when it has ended, its wait status. A program whose stand-in is gone is killed.

What it imports it imports at the first request. It ends when its standard input does.
"""

from __future__ import annotations

import ast
import atexit
import gc
import importlib
import io
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

PACKAGES = ["torch", "torch.distributed.run", "numpy", "pytest", "hypothesis", "safetensors.torch", "tokenizers"]
# Variables that are read while an interpreter starts or something is imported.
EARLY = ("PYTHON", "LD_", "OMP_", "MKL_", "OPENBLAS_", "MALLOC_", "CUDA_", "HF_", "TRANSFORMERS_", "HOME", "LANG", "LC_")
MAX_REQUEST = 1 << 20


def import_packages() -> None:
    """Import what programs need, and keep it out of the garbage collections to come."""
    for name in PACKAGES:
        importlib.import_module(name)
    import megatron

    for found in pkgutil.walk_packages(megatron.__path__, "megatron."):
        try:
            importlib.import_module(found.name)
        except ImportError:  # of an extra; who needs it says so
            continue
    if len(os.listdir("/proc/self/task")) > 1:
        raise SystemExit("a thread runs here, and what it holds would be held for ever in every fork")
    gc.collect()
    gc.freeze()


def startup_variables(environment: dict[str, str]) -> dict[str, str]:
    """Return the part of an environment that counts at the start. PYTHON is only a name that our scripts read."""
    return {name: value for name, value in environment.items() if name.startswith(EARLY) and name != "PYTHON"}


def needs_own_interpreter(request: dict[str, Any]) -> bool:
    """Return whether the program needs an interpreter of its own: by a flag, or by a variable that is read too early for us."""
    words = [word for word in request["words"] if word != "-u"][:1]
    starts = words in (["-m"], ["-c"]) or (bool(words) and not words[0].startswith("-"))
    return not starts or startup_variables(request["environment"]) != startup_variables(dict(os.environ))


class Server:
    """Takes requests at a socket.

    Attributes:
        running: the connection of each process.
        warm: the packages are imported.
    """

    def __init__(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(path)
        self.listener.listen(64)
        self.ended, wake = os.pipe2(os.O_NONBLOCK)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's; who started this ends it
        self.running: dict[int, socket.socket] = {}
        self.warm = False

    def serve(self) -> tuple[dict[str, Any], list[int]]:
        """Fork for each request. Returns in the fork, with the request and the descriptors of its streams."""
        while True:
            watched = {connection.fileno(): pid for pid, connection in self.running.items()}
            ready, _, _ = select.select([0, self.listener, self.ended, *watched], [], [])
            if 0 in ready and not os.read(0, 1024):
                for pid in self.running:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                os._exit(0)
            if self.ended in ready:
                os.read(self.ended, 1024)
                self.reap()
            for number in {*ready} & {*watched}:
                if watched[number] in self.running:
                    os.kill(watched[number], signal.SIGKILL)
            if self.listener in ready and (asked := self.take()):
                return asked

    def reap(self) -> None:
        """Reply the wait status of each process that has ended."""
        while self.running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            with self.running.pop(pid) as connection:
                reply(connection, status)

    def take(self) -> tuple[dict[str, Any], list[int]] | None:
        """Answer one request; return it, and its streams, in the process that is to carry it out."""
        connection, _ = self.listener.accept()
        text, streams, _, _ = socket.recv_fds(connection, MAX_REQUEST, 3)
        if len(streams) != 3:
            return connection.close()
        request = ast.literal_eval(text.decode(errors="surrogateescape"))
        if needs_own_interpreter(request):
            reply(connection, "cold")
            connection.close()
        else:
            if not self.warm:
                import_packages()
                self.warm = True
            pid = os.fork()
            if not pid:
                return request, streams
            self.running[pid] = connection
            reply(connection, pid)
        for stream in streams:
            os.close(stream)
        return None


def reply(connection: socket.socket, word: object) -> None:
    """Send a word to who asked, unless that one is gone."""
    try:
        connection.send(str(word).encode())
    except OSError:  # whoever asked is gone
        return


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Make this fork what a new process would be: its own session, signals, streams, directory and environment."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
    os.chdir(request["directory"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    sys.modules["numpy"].random.seed()
    sys.executable, sys.orig_argv = request["python"], [request["python"], *request["words"]]
    if "-u" in request["words"][:1]:
        for name, number, errors in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
            raw = io.FileIO(number, "w", closefd=False)
            text = io.TextIOWrapper(raw, encoding="utf-8", errors=errors, write_through=True)  # type: ignore[type-var]
            setattr(sys, name, text)
            setattr(sys, f"__{name}__", text)
    elif os.isatty(1):
        sys.stdout.reconfigure(line_buffering=True)


def run(words: list[str]) -> None:
    """Run `python WORDS` in this process."""
    words = words[1:] if words[0] == "-u" else words
    main = sys.modules["__main__"] = ModuleType("__main__")
    vars(main).update(__builtins__=__builtins__, __annotations__={})
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        sys.modules.pop(words[1], None)  # or runpy warns that it is there
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(compile(words[1], "<string>", "exec"), vars(main))
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.realpath(words[0]))
        main.__file__ = words[0]
        exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), vars(main))


def run_to_exit_status(work: Callable[[], object]) -> int:
    """Do a program's work, print what ended it, and return its exit status; minus SIGINT after Ctrl-C."""
    try:
        work()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 255
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def leave(status: int) -> NoReturn:
    """End as an interpreter does, but for taking the modules apart: pages that would be copied, for a third of a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = 120
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    asked, descriptors = Server(sys.argv[1]).serve()
    become(asked, descriptors)
    leave(run_to_exit_status(lambda: run(asked["words"])))
