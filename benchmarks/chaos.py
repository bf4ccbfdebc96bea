"""Kills training runs at random moments, over and over, and counts what was lost: nothing should be.

    python benchmarks/chaos.py [--kills 50] [--seed 1] [--layouts "1;tp 2"] [--saving sync,async] [--directory DIR]

For each layout, with and without --async-save, a tiny GPT first trains undisturbed. Then the same run is started again and
again with --auto-resume, and SIGKILL goes to one random rank, or to all, at a random moment: while it starts, trains, saves
or evaluates. After every kill these must hold:

- the ranks that were spared end by themselves within half a minute (while they start, with a launcher's SIGTERM);
- every checkpoint that was there, and every one that the run said it had saved, is there and whole, byte for byte;
- the next start goes on from the newest of them;
- every line of metrics.jsonl (loss, gradient norm, learning rate, counters, validation), and the numbers and tokens of every
  sample that any rank trained on, are bit for bit those of the undisturbed run.

A run that was killed until it reached its end has each iteration's line once. Exit status 1 when anything does not hold.

Ranks are forked from this process, see `forked.py`. That launchers end as they should is tested elsewhere.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from forked import Attempt, Case  # noqa: E402

from megatron.checkpoint.layout import CheckpointError, iteration_directories, verify  # noqa: E402
from megatron.data.indexed import IndexedWriter, token_dtype  # noqa: E402

MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 1 --global-batch-size 4 --lr 5e-3 --lr-warmup-iters 3 --tokenizer-type ByteTokenizer "
    "--split 70,20,10 --log-interval 1 --eval-interval 8 --eval-iters 2 --save-interval 2"
)
LAYOUTS = MappingProxyType(  # name -> ranks, flags
    {
        "1": (1, ""),
        "dp 2": (2, ""),
        "dp 2, distributed optimizer": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
        "tp 2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        "pp 2": (2, "--pipeline-model-parallel-size 2"),
        "tp 2 x pp 2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --pipeline-schedule zb-h1"),
    }
)
SAVING = MappingProxyType({"sync": "", "async": "--async-save"})
CLOCKED = frozenset({"iteration_time_ms", "tokens_per_second", "tflops_per_gpu", "mfu", "mfu_causal", "peak_memory_bytes"})
PATIENCE = 60.0  # seconds without progress that end the benchmark
END_WITHIN = 30.0  # seconds that ranks have to notice a death
SAVED = re.compile(r"successfully saved checkpoint at iteration +(\d+)")
LOADED = re.compile(r"^loading checkpoint \S*/iter_(\d+)", re.MULTILINE)


@dataclass
class Tally:
    """Kills, resumes and violated guarantees, over all cases. wrong: a line for each guarantee that did not hold."""

    kills: list[tuple[Case, str, str]] = field(default_factory=list)  # case, phase, who was killed
    starts: int = 0
    finished: int = 0
    checkpoints: int = 0
    lost: int = 0
    lines: int = 0
    samples: int = 0
    slowest_end: float = 0.0
    wrong: list[str] = field(default_factory=list)


# What a run leaves behind.


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the whole lines of metrics.jsonl, without what a clock says."""
    path = folder / "save" / "metrics.jsonl"
    found = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKED} for line in found if line.endswith("\n")]


def key(line: dict[str, Any]) -> tuple[int, str]:
    """Return what a metrics line is known by: its iteration, and its split or that it is of a step."""
    return line["iteration"], line.get("split", "step")


def samples(folder: Path) -> set[tuple[int, str]]:
    """Read every step's share of every rank: rank; samples that were consumed before, numbers, checksum of the tokens."""
    return {(int(p.suffix[1:]), text) for p in folder.glob("samples.*") for text in p.read_text().splitlines()}


def committed(folder: Path) -> dict[int, Path]:
    """Return the checkpoints that are whole, byte for byte, by iteration."""
    whole = {}
    for iteration, path in iteration_directories(folder / "save").items():
        try:
            verify(path)
        except CheckpointError:
            continue
        whole[iteration] = path
    return whole


# One run, killed again and again.


class Victim:
    """A run of a case, and the undisturbed one that it must equal."""

    def __init__(self, case: Case, iterations: int, folder: Path, count: Tally, chance: random.Random) -> None:
        self.case, self.iterations, self.folder, self.count, self.chance = case, iterations, folder, count, chance
        self.lives = 0
        self._undisturbed = folder / "undisturbed"
        attempt = Attempt(case, self._undisturbed)
        attempt.wait(10 * PATIENCE)
        if any(attempt.statuses.values()):
            raise SystemExit(f"{case}: the undisturbed run failed\n{attempt.text()[-3000:]}")
        self._lines = {key(line): line for line in metrics(self._undisturbed)}
        self._samples = samples(self._undisturbed)
        self.start_over()

    def start_over(self) -> None:
        """Begin a new run in a directory of its own."""
        self.lives += 1
        self.run, self._known = self.folder / f"run{self.lives}", 0
        self._whole: set[int] = set()

    def kill_once(self) -> bool:
        """Start, kill at a random moment, check. False when it had reached its end before."""
        attempt = self._start()
        ranks = list(range(self.case.ranks))
        whom = ranks if self.chance.random() < 0.5 else [self.chance.choice(ranks)]
        if self.chance.random() < 0.15:
            time.sleep(self.chance.uniform(0.0, 1.0))
        else:
            newest = max(self._whole, default=0)
            self._until(attempt, self.chance.randint(min(newest + 1, self.iterations), self.iterations))
            time.sleep(self.chance.uniform(0.0, 0.08))
        attempt.kill(whom)
        self._ended(attempt)
        killed = -signal.SIGKILL in attempt.statuses.values()
        if killed:
            who = "all" if self.case.ranks > 1 and len(whom) == self.case.ranks else "one"
            self.count.kills.append((self.case, attempt.phase(), who))
        self._check(attempt)
        if not any(attempt.statuses.values()):
            self._at_the_end()
        elif not killed:
            self._wrong(f"ended by itself with {attempt.statuses}: see {attempt.log}")
        return killed

    def finish(self) -> None:
        """Let the run reach its end."""
        attempt = self._start()
        attempt.wait(10 * PATIENCE)
        self._check(attempt)
        if any(attempt.statuses.values()):
            self._wrong(f"did not go on to its end, {attempt.statuses}: see {attempt.log}")
        self._at_the_end()

    def _start(self) -> Attempt:
        self.count.starts += 1
        return Attempt(self.case, self.run)

    def _until(self, attempt: Attempt, iteration: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while attempt.running() and attempt.reached() < iteration:
            if time.monotonic() > deadline:
                attempt.kill(range(self.case.ranks))
                raise SystemExit(f"{self.case}: iteration {iteration} was not reached in {PATIENCE:.0f} s: see {attempt.log}")
            time.sleep(0.005)

    def _ended(self, attempt: Attempt) -> None:
        try:
            self.count.slowest_end = max(self.count.slowest_end, attempt.wait(END_WITHIN))
        except RuntimeError as error:
            self._wrong(str(error))

    def _check(self, attempt: Attempt) -> None:
        """Check that the newest checkpoint was found, none is lost, and the log is the undisturbed run's."""
        text, newest = attempt.text(), max(self._whole, default=None)
        loaded = LOADED.search(text)
        if loaded and int(loaded[1]) != newest:
            self._wrong(f"went on from {int(loaded[1])}, not from {newest}: see {attempt.log}")
        if not loaded and newest is not None and attempt.reached() >= 0:
            self._wrong(f"did not go on from {newest}: see {attempt.log}")
        now = set(committed(self.run))
        for iteration in sorted((self._whole | {int(n) for n in SAVED.findall(text)}) - now):
            self.count.lost += 1
            self._wrong(f"the checkpoint of iteration {iteration} is lost")
        self.count.checkpoints += len(now - self._whole)
        self._whole = now
        lines, read = metrics(self.run), samples(self.run)
        for line in lines:
            if line != self._lines.get(key(line)):
                self._wrong(f"{line} instead of {self._lines.get(key(line))}: see {attempt.log}")
        for rank, text in sorted(read - self._samples):
            self._wrong(f"rank {rank} trained on {text}, which the undisturbed run did not: see {attempt.log}")
        self.count.lines += len(lines)
        self.count.samples += len(read)

    def _at_the_end(self) -> None:
        """Check that every line and every sample is there once, in order; then begin another life."""
        if metrics(self.run) != list(self._lines.values()) or samples(self.run) != self._samples:
            self._wrong(f"the lines of {self.run} are not the undisturbed run's")
        self.count.finished += 1
        self.start_over()

    def _wrong(self, what: str) -> None:
        self.count.wrong.append(f"{self.case}: {what}")
        print(f"WRONG: {self.count.wrong[-1]}", flush=True)


def make_data(folder: Path) -> Path:
    """Write a small dataset of bytes, and return its prefix."""
    prefix = folder / "corpus"
    with IndexedWriter(str(prefix), token_dtype(257)) as writer:
        for number in range(40):
            tokens = np.array([*f"{number} green bottles, hanging on the wall. ".encode() * 12, 256])
            writer.add_document(tokens, [len(tokens)])
        writer.finish()
    return prefix


def report(count: Tally, cases: Sequence[Case], seconds: float) -> str:
    """Format the counts as a table and a few sentences.

    Args:
        count: of all cases.
        cases: the rows of the table.
        seconds: that the benchmark took.
    """
    phases = ("start", "training", "saving", "evaluation")
    found = Counter((case, phase) for case, phase, _ in count.kills)
    width = max(len(str(case)) for case in cases)
    rows = [f"{'killed during':{width}}  " + "  ".join(f"{phase:>10}" for phase in phases)]
    rows += [f"{case!s:{width}}  " + "  ".join(f"{found[case, phase]:10}" for phase in phases) for case in cases]
    rows.append(f"{'all':{width}}  " + "  ".join(f"{sum(found[case, phase] for case in cases):10}" for phase in phases))
    alone = sum(who == "one" for *_, who in count.kills)
    return "\n".join(
        [
            *rows,
            f"kills: {len(count.kills)}, of one rank {alone}, of all {len(count.kills) - alone}; starts: {count.starts}; "
            f"runs that reached their end: {count.finished}",
            f"the ranks that were spared had ended after {count.slowest_end:.1f} s at most",
            f"checkpoints committed: {count.checkpoints}; lost: {count.lost}",
            f"compared with undisturbed runs: {count.lines} lines of metrics, {count.samples} steps' samples of a rank",
            f"what does not hold: {len(count.wrong)}; {seconds:.0f} s",
        ]
    )


def build_cases(layouts: Sequence[str], saving: Sequence[str], iterations: int, data: Path) -> list[Case]:
    """Return the cases of these layouts and ways of saving.

    Args:
        layouts: keys of LAYOUTS.
        saving: keys of SAVING.
        iterations: of each run.
        data: prefix of the dataset.
    """
    common = (*MODEL.split(), "--data-path", str(data), "--train-iters", str(iterations))
    return [
        Case(layout, how, ranks, (*common, *flags.split(), *SAVING[how].split()))
        for how in saving
        for layout, (ranks, flags) in LAYOUTS.items()
        if layout in layouts
    ]


def main() -> int:
    """Run the program, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=24, help="of each run")
    parser.add_argument("--seed", type=int, default=1, help="of layouts, moments and victims")
    parser.add_argument("--layouts", default=";".join(LAYOUTS), help="by name, with semicolons between")
    parser.add_argument("--saving", default=",".join(SAVING))
    parser.add_argument("--directory", help="keep the runs here; without it they are removed when all is well")
    args = parser.parse_args()
    layouts, saving = args.layouts.split(";"), args.saving.split(",")
    if unknown := [name for name in layouts if name not in LAYOUTS] + [name for name in saving if name not in SAVING]:
        parser.error(f"no such {unknown}; there are {list(LAYOUTS)} and {list(SAVING)}")
    folder = Path(args.directory or tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    began, count, chance = time.monotonic(), Tally(), random.Random(args.seed)
    cases = build_cases(layouts, saving, args.iterations, make_data(folder))
    victims: dict[Case, Victim] = {}
    gc.freeze()  # or each rank's first collection copies all that it was forked with
    while len(count.kills) < args.kills and len(count.wrong) < 20:
        case = cases[len(count.kills) % len(cases)]
        if case not in victims:
            victims[case] = Victim(case, args.iterations, folder / f"case{len(victims)}", count, chance)
        if victims[case].kill_once():
            case, phase, who = count.kills[-1]
            print(f"kill {len(count.kills)}: {case}, {who}, during {phase}", flush=True)
    for victim in victims.values():
        victim.finish()
    print(report(count, list(victims), time.monotonic() - began), flush=True)
    if args.directory is None and not count.wrong:
        shutil.rmtree(folder)
    return 1 if count.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
