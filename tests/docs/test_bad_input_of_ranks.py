"""Bad input to programs that run on several processes, as torchrun starts them.

What all of them say together is at most three lines, and the launcher's own report has the first process's words.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from test_bad_input import BERT, BYTES, FILES, MAX_LINES, PLACES, ROOT, TASK, VALUES, good

__all__ = ["good"]  # the fixture
RANKS = 2
KINDS = {**FILES, **{f"{kind}, to write to": make for kind, make in PLACES.items()}, **VALUES, "an unknown flag": None}
ROWS = [  # the last flag takes what the kind says
    (f"{BYTES} --data-path", "missing"),
    (f"{BYTES} --data-path", "a named pipe"),
    (f"{BYTES} --data-path", "random bytes"),
    (f"{BYTES} --data-path {{prefix}} --load", "a tracker of no number"),
    (f"{BYTES} --data-path {{prefix}} --config", "half a surrogate pair"),
    (f"{BYTES} --data-path {{prefix}} --save", "below a file, to write to"),
    (f"{BYTES} --data-path {{prefix}} --lr", "nan"),
    (f"{BYTES} --data-path {{prefix}}", "an unknown flag"),
    (f"{BERT} --data-path {{prefix}} --vocab-file", "a git-lfs pointer"),
    (f"{TASK.format('SQUAD')} --valid-data {{corpus}} --train-data", "half a surrogate pair"),
    ("tasks/main.py --task LAMBADA --load {gpt} --valid-data", "deep JSON"),
    ("tasks/main.py --task LAMBADA --valid-data {corpus} --load", "an empty directory"),
    ("tools/generate.py --prompt x --max-new-tokens 1 --load", "a directory of a model without weights"),
    ("tools/generate.py --load {gpt} --max-new-tokens 1 --prompt-file", "missing"),
    ("tools/text_generation_server.py --load", "missing"),
    ("tools/text_generation_server.py --load {gpt} --port", "x"),
]


def as_torchrun(words: list[str], folder: Path) -> tuple[list[int], list[str], list[str]]:
    """Run a command on RANKS processes, of which the others get SIGTERM when one has failed.

    Returns their exit statuses, the lines that they wrote to stderr, and the messages that they left for the launcher.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    job |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(RANKS):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(folder / f"left.{rank}")}
        with open(folder / f"err.{rank}", "w") as err:
            command = [os.environ["WARM_PYTHON"], str(ROOT / words[0]), *words[1:]]
            environment = {**os.environ, **job, **own}
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=err))
    told = False
    while any(process.poll() is None for process in started):
        if not told and any(process.returncode for process in started):
            told = True
            for process in started:
                process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    said = [line for rank in range(RANKS) for line in (folder / f"err.{rank}").read_text().splitlines()]
    left = [folder / f"left.{rank}" for rank in range(RANKS)]
    messages = [json.loads(file.read_text())["message"]["message"] for file in left if file.exists()]
    return [process.returncode for process in started], said, messages


@pytest.mark.parametrize(("row", "kind"), ROWS)
def test_several_ranks_report_bad_input_once(row: str, kind: str, good: dict[str, str], tmp_path: Path) -> None:
    make = KINDS[kind]
    words = [*shlex.split(row.format(**good, new=tmp_path / "new")), make(tmp_path, "bad") if make else "--unheard-of"]
    statuses, said, left = as_torchrun(words, tmp_path)
    assert 1 <= len(said) <= MAX_LINES and "Traceback" not in "".join(said), said
    assert {*statuses} <= {0, 1, 2, -signal.SIGTERM} and {*statuses} & {1, 2}, (statuses, said)
    assert left, "the launcher has something to report"
    assert any(word in " ".join(said) for word in left[0].split("\n")[:1]), (left, said)
