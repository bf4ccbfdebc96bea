"""Training tokens per second, side by side in one run: this framework against what else trains the same model.

    python benchmarks/train.py                                   all cases of the device at hand
    python benchmarks/train.py --cases small dp2 --rounds 9 --json results.json
    python benchmarks/train.py --cases gpu-345m-fusion gpu-345m-adam         options of ours, on against off

Every contender of a case has processes of its own, so that none gets what another sets up for itself. They take turns, round
by round, so that a slow minute of the machine falls on all of them; who has no turn waits and computes nothing. A figure is
the median over rounds, a ratio the median of the ratios within each round; the ranges are the smallest and the largest. Every
contender's loss is printed too: equal work must bring equal losses.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import signal
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import baselines
import ours
import torch
import torch.distributed as dist
from cases import CASES, Case

from megatron.train.report import peak_tflops

CONTENDERS: dict[str, baselines.Contender] = {
    "ours": ours.ours,
    "ours-eager": partial(ours.ours, options=ours.Options(eager=True)),
    "ours-eager-unfused": partial(ours.ours, options=ours.Options(eager=True, fusion=False)),
    "ours-foreach": partial(ours.ours, options=ours.Options(kernel="foreach")),
    "ours-bf16-grads": partial(ours.ours, options=ours.Options(bf16_gradients=True)),
    "ours-gloo": partial(ours.ours, options=ours.Options(shared_memory=False)),
    "ours-ddp": ours.ours_in_ddp,
    "transformers-stock": baselines.transformers_stock,
    "transformers": baselines.transformers,
    "transformers-ddp": partial(baselines.transformers, ddp=True),
    "plain-torch": baselines.plain,
    "dtensor": baselines.dtensor,
}


@dataclass(frozen=True)
class Answer:
    """A rank's report after a turn.

    Attributes:
        seconds: of the whole turn.
        loss: of its last step.
        error: a traceback; then there is nothing else.
    """

    seconds: float = 0.0
    loss: float = 0.0
    error: str = ""


C = TypeVar("C")  # a kind of case, a dataclass

WARM_UP, TRAIN = "warm up", "train"  # what a contender is told
Turns = Callable[[str], Answer]
Prepare = Callable[[str, Case, int], AbstractContextManager[Turns]]


class Failure(Exception):
    """A rank of a contender failed; says which one and how."""


def settle(device: str) -> None:
    """Wait until all work of all ranks is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def random_text(case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw tokens and labels of a rank's step. Data-parallel ranks have their own; ranks that share a model share them."""
    dims, draw = case.dims, torch.Generator().manual_seed(rank // case.tp % case.dp)
    rows = case.micro_batches * dims.micro_batch
    text = torch.randint(dims.vocab, (rows, dims.seq + 1), generator=draw).to(case.device)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def turn(step: baselines.Step, text: tuple[torch.Tensor, torch.Tensor], steps: int, device: str) -> Answer:
    """Time several optimizer steps on the same text.

    Args:
        step: of a contender.
        text: tokens and labels, both `[rows, seq]`.
        steps: how many.
        device: `cpu` or `cuda`.
    """
    settle(device)
    begun = time.perf_counter()
    for _ in range(steps):
        loss = step(*text)
    settle(device)
    return Answer(time.perf_counter() - begun, loss)


@contextmanager
def ready_to_train(contender: str, case: Case, rank: int) -> Iterator[Turns]:
    """Build a contender that is ready to take turns: warm up, or train.

    Args:
        contender: a key of CONTENDERS.
        case: model and layout.
        rank: of this process.
    """
    with CONTENDERS[contender](case) as step:
        text = random_text(case, rank)
        yield lambda message: turn(step, text, 1 if message == WARM_UP else case.steps, case.device)


def serve_turns(prepare: Prepare, contender: str, case: Case, rank: int, pipe: Connection) -> None:
    """Be one rank of one contender. The first message is a port and asks to build and warm up, the others ask for turns.

    Args:
        prepare: builds the contender.
        contender: its name.
        case: model and layout.
        rank: of this process.
        pipe: to the conductor; an empty message ends the rank.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks), LOCAL_WORLD_SIZE=str(case.ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(pipe.recv()))
    with ExitStack() as stack:
        try:
            torch.manual_seed(1234)
            take = stack.enter_context(prepare(contender, case, rank))
            pipe.send(take(WARM_UP))
            while message := pipe.recv():
                pipe.send(take(message))
        except (Exception, SystemExit) as error:
            # Said before the process group is left, since that makes the other ranks fail too.
            pipe.send(Answer(error="".join(traceback.format_exception(error))))


@dataclass(frozen=True)
class Rank:
    """A rank as the conductor sees it."""

    contender: str
    rank: int
    process: BaseProcess
    pipe: Connection

    def tell(self, message: object) -> None:
        """Send a message to the process."""
        with suppress(BrokenPipeError):  # it ended before its time, and whoever waits for its answer finds out
            self.pipe.send(message)


class Contest:
    """The processes of one case. Leaving it ends them: in peace after the last turn, by force after an exception."""

    def __init__(self, case: Case, prepare: Prepare = ready_to_train) -> None:
        self.ranks: list[Rank] = []
        context = mp.get_context("spawn")
        # Ctrl-C reaches every process of a terminal. Those here inherit that it is blocked, and the conductor ends them. Itself
        # it takes what came meanwhile at the end of this block; ignored it would be lost. The tracker's start would unblock it.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for contender in case.contenders:
                for rank in range(case.ranks):
                    here, there = context.Pipe()
                    process = context.Process(target=serve_turns, args=(prepare, contender, case, rank, there), daemon=True)
                    process.start()
                    there.close()
                    self.ranks.append(Rank(contender, rank, process, here))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for rank in self.ranks:
            if kind is None:
                rank.tell(False)
            else:
                rank.process.kill()
        for rank in self.ranks:
            rank.process.join(30)
            rank.process.kill()
            rank.process.join()

    def warm_up(self, contender: str) -> Answer:
        """Build the contender and do one step, while no other works: compilation times candidates too."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port: int = listener.getsockname()[1]
        return self.ask(contender, port)[0]

    def turn(self, contender: str) -> Answer:
        """Take one turn, from the first rank's start to the last rank's end.

        Raises:
            Failure: a rank of any contender failed.
        """
        return self.ask(contender, TRAIN)[0]

    def ask(self, contender: str, message: object) -> list[Any]:
        """Send a message to all ranks of a contender, and return the answer of each.

        Raises:
            Failure: a rank of any contender failed.
        """
        asked = [rank for rank in self.ranks if rank.contender == contender]
        for rank in asked:
            rank.tell(message)
        answers: dict[int, Answer] = {}
        by_pipe = {rank.pipe: rank for rank in self.ranks}
        while len(answers) < len(asked):
            for rank in [by_pipe[pipe] for pipe in wait(list(by_pipe)) if isinstance(pipe, Connection)]:
                who = f"rank {rank.rank} of {rank.contender}"
                try:
                    answer: Answer = rank.pipe.recv()
                except (EOFError, OSError):
                    rank.process.join(5)
                    raise Failure(f"{who} ended without an answer, exit code {rank.process.exitcode}") from None
                if answer.error:
                    raise Failure(f"{who} failed\n{answer.error}")
                answers[rank.rank] = answer
        return [answers[rank.rank] for rank in asked]


def take_turns(case: Case, rounds: int) -> dict[str, Any]:
    """Measure tokens per second over all ranks, and the loss, of every contender in every round."""
    order = list(case.contenders)
    speeds: dict[str, list[float]] = {contender: [] for contender in order}
    with Contest(case) as contest:
        losses = {contender: [contest.warm_up(contender).loss] for contender in order}
        for first in range(rounds):
            first %= len(order)
            for contender in order[first:] + order[:first]:
                answer = contest.turn(contender)
                speeds[contender].append(case.steps * case.tokens_per_step / answer.seconds)
                losses[contender].append(answer.loss)
    device = torch.device(case.device)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {case.threads} thread(s) a rank"
    return {"chip": chip, "peak_tflops": peak_tflops(device, None), "tokens_per_second": speeds, "losses": losses}


def spread(values: list[float]) -> tuple[float, float, float]:
    """Return median, minimum and maximum."""
    return statistics.median(values), min(values), max(values)


def table(result: dict[str, Any]) -> str:
    """Format the result of one case as a table."""
    case, speeds = CASES[result["case"]], result["tokens_per_second"]
    peak, own = result["peak_tflops"], case.contenders[0]  # the one that the others are compared with
    lines = [f"{result['case']}: {case.title} ({result['chip']})"]
    lines.append(f"  {'':20}{'tokens/s':>10}  {'range':>19}   {own + ' is':>8}  {'range':>13}   {'loss':>15}")
    for name, values in speeds.items():
        middle, low, high = spread(values)
        first, last = result["losses"][name][0], result["losses"][name][-1]
        line = f"  {name:20}{middle:10,.0f}  {f'{low:,.0f} - {high:,.0f}':>19}"
        if name == own:
            line += " " * 27
        else:
            ratio, worst, best = spread([mine / theirs for mine, theirs in zip(speeds[own], values, strict=True)])
            line += f"   {ratio:7.2f}x  {f'{worst:.2f} - {best:.2f}':>13}"
        line += f"   {f'{first:.3f} -> {last:.3f}':>15}"
        if peak is not None:
            line += f"   MFU {middle * case.dims.flops_per_token / (peak * 1e12 * case.ranks):.1%}"
            line += f" (causal half {middle * case.dims.causal_flops_per_token / (peak * 1e12 * case.ranks):.1%})"
        lines.append(line)
    if peak is not None:
        lines.append(
            f"  MFU against {peak:g} TFLOP/s, the dense bf16 peak; {case.dims.flops_per_token:.4g} FLOP a token with attention "
            f"over the whole square, {case.dims.causal_flops_per_token:.4g} with its causal half, as NVIDIA's tables count"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark, and return its exit status."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    here = [name for name, case in CASES.items() if case.device == device]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=here, help=f"default here: {' '.join(here)}")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    elsewhere = [name for name in arguments.cases if CASES[name].device == "cuda" and device != "cuda"]
    if elsewhere:
        parser.error(f"these cases need a GPU, and torch sees none: {' '.join(elsewhere)}")
    return measure(CASES, arguments, take_turns, table)


def measure(
    cases: Mapping[str, C],
    arguments: argparse.Namespace,
    take: Callable[[C, int], dict[str, Any]],
    shown: Callable[[dict[str, Any]], str],
) -> int:
    """Measure cases one after the other, and print each.

    Args:
        cases: by name.
        arguments: of the command line: cases, rounds, json.
        take: measures a case in so many rounds.
        shown: formats a case's result.

    Returns:
        The program's exit status.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no process is left behind
    results = []
    for name in arguments.cases:
        try:
            measured = take(cases[name], arguments.rounds)
        except Failure as failure:
            print(f"error: case {name}: {failure}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            return 130
        results.append({"case": name, **asdict(cases[name]), **measured})
        print(shown(results[-1]) + "\n", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
