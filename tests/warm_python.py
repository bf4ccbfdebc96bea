"""A stand-in for python: `warm_python.py PYTHON SOCKET WORDS` runs `PYTHON WORDS` as a fork of `warm.py`, which has torch.

It gives the fork its streams, passes signals on, and ends as the fork ends. Where the fork would not be the same it starts
the real one. It imports little: it is to start at once.
"""

import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
USUAL = (signal.SIGPIPE, signal.SIGXFSZ)  # which every Python ignores

python, path, *words = sys.argv[1:]
began: list[int] = []  # the number of the process, once it runs
early: list[int] = []  # signals that came before


def pass_on(number: int, _: object) -> None:
    if began:
        try:
            os.kill(began[0], number)
        except ProcessLookupError:
            return
    else:
        early.append(number)


def main() -> None:
    ignored = [number for number in set(signal.Signals) - {*USUAL} if signal.getsignal(number) == signal.SIG_IGN]
    os.umask(mask := os.umask(0))
    request = {
        "words": words, "python": os.environ.get("WARM_PYTHON", python), "environment": dict(os.environ),
        "ignored": [*map(int, ignored)], "directory": os.getcwd(), "umask": mask,
    }  # fmt: skip
    # Each rank is to have its own order of sets, as processes do: two servers differ in it.
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(f"{path}.{int(os.environ.get('RANK') or 0) % 2}")
        for number in {*PASSED_ON} - {*ignored}:
            signal.signal(number, pass_on)
        socket.send_fds(connection, [repr(request).encode(errors="surrogateescape")], [0, 1, 2])
        answer = connection.recv(64)
    except (OSError, ValueError):
        answer = b"cold"
    if answer == b"cold":
        for number in {*PASSED_ON} - {*ignored}:
            signal.signal(number, signal.SIG_DFL)
        os.execv(python, [python, *words])
    began.append(int(answer))
    for number in early:
        pass_on(number, None)
    for stream in (0, 1, 2):  # whoever reads or writes at the other end is to see an end when the fork has ended
        os.close(stream)
    status = connection.recv(64)
    if not status:
        os._exit(1)  # the server is gone, and has killed what it had
    code = os.waitstatus_to_exitcode(int(status))
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
