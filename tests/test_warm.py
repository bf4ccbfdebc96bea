"""The stand-in for python runs a program as python does: what it sees, how it ends, what is written, which signals it gets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WARM = os.environ["WARM_PYTHON"]
SEEN = (
    "import os, sys; print(sys.argv, os.getcwd(), os.environ['A'], sys.path[0], __name__, input(), os.getpid() == os.getsid(0))"
)
ENDS = {
    "nothing": "print('said'); import atexit; atexit.register(print, 'at exit')",
    "a status": "import sys; sys.exit(75)",
    "words": "raise SystemExit('in words')",
    "an error": "def f():\n    raise ValueError('no')\nf()",
    "an interrupt": "raise KeyboardInterrupt",
    "a signal": "import os; os.kill(os.getpid(), 9)",
    "at once": "import os; print('not said'); os._exit(3)",
    "a thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
    "a module that is missing": "import nowhere",
}


def both(*words: str, **keywords: object) -> list[subprocess.CompletedProcess[str]]:
    """Run the real one and the stand-in, and return what comes of both."""
    run = [
        subprocess.run([python, *words], capture_output=True, text=True, check=False, **keywords)  # type: ignore[call-overload]
        for python in (sys.executable, WARM)
    ]
    return run


@pytest.mark.parametrize("kind", ["-c", "script", "module"])
def test_a_warm_program_sees_what_a_cold_one_does(kind: str, tmp_path: Path) -> None:
    (tmp_path / "seen.py").write_text(SEEN)
    words = {"-c": ["-c", SEEN], "script": ["seen.py"], "module": ["-m", "seen"]}[kind]
    settings = {"cwd": tmp_path, "env": {**os.environ, "A": "ä\n"}, "input": "typed\n", "start_new_session": True}
    real, warm = both(*words, "--flag", "b c", **settings)
    assert real.returncode == 0 and real.stdout.endswith("typed True\n")
    assert (warm.returncode, warm.stdout, warm.stderr) == (0, real.stdout, real.stderr)


@pytest.mark.parametrize("way", ENDS)
def test_how_a_program_ends(way: str, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(ENDS[way])
    real, warm = both(str(path))
    assert (warm.returncode, warm.stdout, warm.stderr) == (real.returncode, real.stdout, real.stderr)


def test_torch_is_there_already() -> None:
    loaded = "import sys; print('torch' in sys.modules, 'megatron.contract' in sys.modules)"
    real, warm = both("-c", loaded)
    assert real.stdout == "False False\n" and warm.stdout == "True True\n"


@pytest.mark.parametrize("cause", [{"OMP_NUM_THREADS": "2"}, {"PYTHONWARNINGS": "error"}, "-S"])
def test_what_counts_at_the_start_makes_a_start(cause: dict[str, str] | str) -> None:
    flags, variables = ([cause], {}) if isinstance(cause, str) else ([], cause)
    _, warm = both(*flags, "-c", "import sys; print('torch' in sys.modules)", env={**os.environ, **variables})
    assert warm.stdout == "False\n"


def test_ranks_have_an_order_of_sets_each() -> None:
    asked = ["-c", "print(hash('a'))"]
    found = [both(*asked, env={**os.environ, "RANK": rank})[1].stdout for rank in ("0", "1", "2")]
    assert found[0] == found[2] != found[1]


def there_and_back(x: object) -> object:
    return x


def test_tensors_reach_ranks_and_come_back_as_they_are() -> None:
    """Every type, the numbers that are none, a part of another one, none at all, and what has a gradient."""
    import torch
    from ranks import on_ranks

    whole = torch.tensor([[1.0, -0.0, float("nan")], [float("inf"), 1e-45, 3.14159]])
    sent = [whole.to(kind) for kind in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)]
    sent += [whole.T, whole[:, 1], whole[1, 2], whole[:0], torch.empty(0, 3, dtype=torch.int32), torch.nn.Parameter(whole)]
    sent += [torch.complex(whole, whole).conj()]
    for back in on_ranks(2, there_and_back, sent):
        for ours, theirs in zip(sent, back, strict=True):
            assert (type(theirs), theirs.dtype, theirs.requires_grad) == (type(ours), ours.dtype, ours.requires_grad)
            torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)
            assert theirs.is_conj() == ours.is_conj()
            assert ours.is_complex() or torch.equal(theirs.signbit(), ours.signbit())


def test_signals_reach_the_program() -> None:
    program = "import signal\nsignal.signal(10, lambda *_: print('got it', flush=True))\n"
    program += "print('up', flush=True)\nwhile True:\n    signal.pause()"
    with subprocess.Popen([WARM, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "got it\n"
        process.terminate()
    assert process.returncode == -signal.SIGTERM


def test_a_program_does_not_outlive_its_stand_in() -> None:
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"
    with subprocess.Popen([WARM, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        own = Path(f"/proc/{int(process.stdout.readline())}")
        assert own.exists()
        process.kill()
    deadline = time.monotonic() + 30.0
    while own.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
