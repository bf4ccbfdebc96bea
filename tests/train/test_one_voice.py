"""A mistake in a command for several ranks is said once: by the first rank, or by the one that alone has it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.config.command_line.parse import parse
from megatron.config.errors import ConfigError
from megatron.data.indexed import IndexedWriter, token_dtype
from megatron.launch.command_line import torchrun_command

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "pretrain_gpt.py"
SIZES = "--num-layers 1 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8"
SIZES += " --micro-batch-size 1 --global-batch-size 6 --train-iters 1 --lr 1 --tokenizer-type ByteTokenizer"


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """A legal command for six ranks or fewer."""
    with IndexedWriter(str(tmp_path / "data"), token_dtype(257)) as writer:
        for _ in range(9):
            writer.add_document(np.ones(50), [50])
        writer.finish()
    return [*SIZES.split(), "--data-path", str(tmp_path / "data")]


def wait_for_ends(*started: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    said = [process.communicate(timeout=120) for process in started]
    return [(process.returncode, *both) for process, both in zip(started, said, strict=True)]


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    settings = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "SLURM"))}
    settings |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(
        [sys.executable, *words], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=settings, cwd=ROOT
    )


def test_torchrun_reports_one_rank(flags: list[str]) -> None:
    """All that it prints is three lines of ours, one for each rank that it ends, and its own report of the first one."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3")
    ((status, out, err),) = wait_for_ends(start(*launcher, str(PROGRAM), *flags, "--tensor-model-paralel-size", "2"))
    ours = [line for line in err.splitlines() if line.startswith(("error:", "pretrain_gpt.py:"))]
    assert status == 1 and out == "" and len(ours) == 2
    assert ours[0].startswith("error: `--tensor-model-paralel-size` is not a known flag; did you mean")
    assert "<NO_OTHER_FAILURES>" in err and err.count("exitcode  : ") == 1 and "exitcode  : 2 " in err
    assert err.count("`--tensor-model-paralel-size`") == 2, "once above, and in torchrun's report as the cause"
    assert err.count("Traceback (most recent call last):") == 1, "torchrun's own"
    *_, before, after = re.split(r"^Traceback .*?^(?=torch\.)", err, flags=re.DOTALL | re.MULTILINE)
    assert len(before.splitlines()) <= 6 and len(after.splitlines()) <= 18, err


def on_two(flags: list[str], *second: str) -> list[tuple[int, str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    first = start(str(PROGRAM), *flags, **job, RANK="0")
    return wait_for_ends(first, start(str(PROGRAM), *flags, *second, **job, RANK="1"))


def test_the_others_are_silent(flags: list[str]) -> None:
    first, second = on_two([*flags, "--lr", "-1"])
    assert first[0] == 2 and "`--lr -1" in first[2] and second == (2, "", "")


def test_a_rank_that_alone_lacks_a_file_says_so(flags: list[str], tmp_path: Path) -> None:
    """The other one has read its command by then, and ends as well."""
    first, second = on_two(flags, "--data-path", str(tmp_path / "nowhere"))
    said = [line for _, _, err in (first, second) for line in err.splitlines()]
    assert (first[0], second[0]) == (2, 2) and len(said) == 1, (first, second)
    assert said[0].startswith(f"error: rank 1 on host {os.uname().nodename}, ") and "nowhere" in said[0]


def problem(flags: list[str], world: int, *more: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse([*flags, *more], program="p", world_size=world)
    (found,) = error.value.problems
    return f"{found} [{found.ranks}]"


def test_a_number_of_processes_that_fits(flags: list[str]) -> None:
    """Nearest to what there is, and such that the batch of 6 divides over its ranks too."""
    tp = ("--tensor-model-parallel-size", "2")
    for world, fits in ((1, 2), (3, 2), (5, 4), (9, 6), (13, 12)):
        assert problem(flags, world, *tp).endswith(f"multiples of 2, such as {fits} [{fits}]"), world
    assert problem(flags, 1, *tp, "--dry-run").endswith("such as 2 (--world-size) [2]")


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("python pretrain_gpt.py", "torchrun --nproc_per_node 2 pretrain_gpt.py"),
        ("python -u -X dev pretrain_gpt.py", "torchrun --nproc_per_node 2 pretrain_gpt.py"),
        ("python -m megatron.tasks.lm_eval", "torchrun --nproc_per_node 2 -m megatron.tasks.lm_eval"),
        ("ENV/bin/python a/main.py", "ENV/bin/torchrun --nproc_per_node 2 a/main.py"),
        ("/none/bin/python a/main.py", "/none/bin/python -m torch.distributed.run --nproc_per_node 2 a/main.py"),
    ],
)
def test_torchrun_is_advised_in_the_users_own_words(
    typed: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "torchrun").write_text("")
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    argv = ["--data-path", "a b", "--lr", "1"]
    monkeypatch.setattr(sys, "orig_argv", [*typed.replace("ENV", str(tmp_path)).split(), *argv])
    assert torchrun_command(2, "p.py", argv) == [*answer.replace("ENV", str(tmp_path)).split(), *argv]


def test_a_forgotten_torchrun(flags: list[str], tmp_path: Path) -> None:
    more = ["--save", str(tmp_path / "a b"), "--save-interval", "1", "--tensor-model-parallel-size", "2"]
    ((status, out, err),) = wait_for_ends(start("pretrain_gpt.py", *flags, *more))
    assert status == 2 and out == "" and err.count("\n") == 3
    line = err.splitlines()[1]
    assert line.startswith("start 2 processes: ") and "torchrun --nproc_per_node 2 pretrain_gpt.py --num-layers 1 " in line
    assert f"--save '{tmp_path / 'a b'}' --save-interval 1 --tensor-model-parallel-size 2" in line
