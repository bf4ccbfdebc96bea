"""Pipelined training steps, side by side in one run: this framework's executor against torch.distributed.pipelining.

    python benchmarks/pipeline.py                                           a small model on 2 ranks x 1 thread
    python benchmarks/pipeline.py --cases pp2 pp2-gpt2 --rounds 9 --json results.json

Contenders take turns as in train.py, in processes of their own. Each turn is timed twice: whole optimizer steps, and the
forward and backward passes alone. Every ratio is against `torch-1f1b`, the median of those within each round; ranges are the
smallest and the largest. Equal work must bring equal losses: they may differ by 1e-4, or the run fails.

Of our own executor a third turn measures what it costs. The time of every action is measured, the simulator says how long a
step of those actions takes if each starts as early as it can and transfers take none, and the overhead is what the step really
took beyond that, from the first rank's start to the last rank's end.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ours
import torch
from cases import PIPELINES, Case
from pipelined import CONTENDERS, OUR_SCHEDULES, Pipelined, build_plan, without_broken
from train import WARM_UP, Answer, Contest, Failure, Turns, measure, random_text, settle, spread, turn

from megatron.pipeline.executor import Executor
from megatron.pipeline.profile import Stopwatch
from megatron.pipeline.schedules.schedule import Action, Schedule, make_schedule
from megatron.pipeline.schedules.simulate import MeasuredCosts, simulate

STEPS, GRADIENTS, PROFILE = "steps", "gradients", "profile"
BAR = "torch-1f1b"
CLOSE = 1e-4  # losses of equal work, in nats


@dataclass(frozen=True)
class Pass:
    """One rank's forward and backward passes of a step.

    Attributes:
        begin: on the host's clock, in seconds.
        end: likewise.
        seconds: of every action.
    """

    begin: float
    end: float
    seconds: Mapping[Action, float]


@dataclass(frozen=True)
class Profile(Answer):
    """An answer with the times of every action."""

    passes: tuple[Pass, ...] = ()


@dataclass(frozen=True)
class ActionCosts:
    """Costs for the simulator: every action takes as long as it took; results are there at once."""

    seconds: Mapping[Action, float]
    communication: float = 0.0

    def duration(self, action: Action) -> float:
        return self.seconds[action]


@contextmanager
def ready_for_turns(contender: str, case: Case, rank: int) -> Iterator[Turns]:
    """Build a contender that is ready to take turns of each kind.

    Args:
        contender: a key of CONTENDERS.
        case: model and layout.
        rank: of this process.
    """
    with CONTENDERS[contender](case) as pipelined:
        text = random_text(case, rank)

        def take(message: str) -> Answer:
            if message == PROFILE and pipelined.executor is not None:
                return Profile(passes=profile(pipelined.executor, case, text))
            if message == GRADIENTS:
                return turn(lambda *text: run_gradients(pipelined, *text), text, case.steps, case.device)
            return turn(pipelined.step, text, 1 if message == WARM_UP else case.steps, case.device)

        yield take


def run_gradients(pipelined: Pipelined, tokens: torch.Tensor, labels: torch.Tensor) -> float:
    """Run the forward and backward passes of one step.

    Args:
        pipelined: the contender.
        tokens: `[rows, seq]`.
        labels: `[rows, seq]`.

    Returns:
        NaN in the place of the loss, which may be on another rank.
    """
    pipelined.gradients(tokens, labels)
    return math.nan  # not asked for: it may be on another rank


def profile(executor: Executor, case: Case, text: tuple[torch.Tensor, torch.Tensor]) -> tuple[Pass, ...]:
    """Time each action of a few passes. They add to gradients that the next step zeroes.

    Args:
        executor: of our pipeline, on this rank.
        case: says how many passes.
        text: tokens and labels, both `[rows, seq]`.
    """
    batches, passes, plain = ours.micro_batches_from_text(case, *text), [], executor.recorder
    for _ in range(case.steps):
        executor.recorder = stopwatch = Stopwatch(executor.device)
        settle(case.device)
        begin = time.perf_counter()
        executor.step(batches)
        end = time.perf_counter()
        passes.append(Pass(begin, end, {action: b - a for action, (a, b) in stopwatch.spans().items()}))
    executor.recorder = plain
    return tuple(passes)


def build_schedule(case: Case, contender: str) -> Schedule:
    """Return the schedule that a contender runs in a case."""
    return make_schedule(OUR_SCHEDULES[contender], case.pp, case.micro_batches, build_plan(case, contender).chunks)


def elapsed(ranks: Sequence[Pass]) -> float:
    """Return the seconds from the first rank's start to the last one's end; `perf_counter` is one clock for all of a host."""
    return max(rank.end for rank in ranks) - min(rank.begin for rank in ranks)


def overhead(schedule: Schedule, ranks: Sequence[Pass]) -> float:
    """Return the time of one pass beyond what the simulator predicts from its actions' times, as a share of that."""
    seconds = {action: s for rank in ranks for action, s in rank.seconds.items()}
    return elapsed(ranks) / simulate(schedule, ActionCosts(seconds)).makespan - 1.0


def typical_overhead(schedule: Schedule, passes: Sequence[Sequence[Pass]]) -> float:
    """Compare the median step with a prediction from the median time of each kind of action on each stage."""
    seconds: dict[Any, list[float]] = {}
    for ranks in passes:
        for rank in ranks:
            for action, s in rank.seconds.items():
                seconds.setdefault((action.op, action.stage), []).append(s)
    costs = MeasuredCosts({kind: statistics.median(times) for kind, times in seconds.items()})
    return statistics.median(map(elapsed, passes)) / simulate(schedule, costs).makespan - 1.0


def take_turns(case: Case, rounds: int) -> dict[str, Any]:
    """Measure every contender's tokens per second in every round, with the update and without; losses; our overheads."""
    case = without_broken(case)
    order = list(case.contenders)
    speeds: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in order} for kind in (STEPS, GRADIENTS)}
    passes: dict[str, list[tuple[Pass, ...]]] = {name: [] for name in order if name in OUR_SCHEDULES}
    with Contest(case, ready_for_turns) as contest:
        losses = {name: [contest.warm_up(name).loss] for name in order}
        for first in range(rounds):
            first %= len(order)
            for name in order[first:] + order[:first]:
                for kind in (STEPS, GRADIENTS):
                    answer = contest.ask(name, kind)[0]
                    speeds[kind][name].append(case.steps * case.tokens_per_step / answer.seconds)
                    if kind == STEPS:
                        losses[name].append(answer.loss)
                if name in passes:
                    passes[name] += zip(*(answer.passes for answer in contest.ask(name, PROFILE)), strict=True)
    check_losses(losses)
    schedules = {name: build_schedule(case, name) for name in passes}
    return {
        "chip": f"CPU, {case.threads} thread(s) a rank",
        "layers": {name: [len(part.layers) for part in build_plan(case, name).parts] for name in order},
        "tokens_per_second": speeds[STEPS],
        "gradients_tokens_per_second": speeds[GRADIENTS],
        "losses": losses,
        "overheads": {name: [overhead(schedules[name], ranks) for ranks in passes[name]] for name in passes},
        "typical_overheads": {name: typical_overhead(schedules[name], passes[name]) for name in passes},
    }


def check_losses(losses: Mapping[str, Sequence[float]]) -> None:
    """Raise `Failure` unless all contenders had the same loss in every round."""
    for turn_number, of_turn in enumerate(zip(*losses.values(), strict=True)):
        if not max(of_turn) - min(of_turn) <= CLOSE:
            said = ", ".join(f"{name} {loss:.6f}" for name, loss in zip(losses, of_turn, strict=True))
            raise Failure(f"the contenders do not do equal work; losses after turn {turn_number}: {said}")


def table(result: dict[str, Any]) -> str:
    """Format the result of one case as a table."""
    case = PIPELINES[result["case"]]
    columns = result["tokens_per_second"], result["gradients_tokens_per_second"]
    lines = [f"{result['case']}: {case.title} ({result['chip']})"]
    lines.append(f"  {'':23}{'':>9}   {'whole step':>10}   {f'against {BAR}':20}   {'passes':>10}   {f'against {BAR}':20}")
    lines.append(f"  {'':23}{'layers':>9}   {'tokens/s':>10}   {'':20}   {'tokens/s':>10}   {'':20}   {'loss':>18}")
    for name in columns[0]:
        cells = [f"{statistics.median(speeds[name]):10,.0f}   {against(speeds, name):20}" for speeds in columns]
        layers = "-".join(map(str, result["layers"][name]))
        first, last = result["losses"][name][0], result["losses"][name][-1]
        lines.append("   ".join([f"  {name:23}{layers:>9}", *cells, f"{first:.4f} -> {last:.4f}"]))
    lines += [
        f"  {name:23}left out: torch {torch.__version__} fails to run it" for name in case.contenders if name not in columns[0]
    ]
    lines.append("  executor overhead: time of a step's passes beyond the simulator's prediction from its actions' times")
    for name, values in result["overheads"].items():
        middle, low, high = spread(values)
        typical = result["typical_overheads"][name]
        lines.append(f"  {name:23}{middle:9.1%}   {f'{low:.1%} - {high:.1%}':15}   from the actions' medians {typical:.1%}")
    return "\n".join(lines)


def against(speeds: Mapping[str, Sequence[float]], name: str) -> str:
    """Format the ratio to the bar, with its range; empty where there is no bar."""
    if BAR not in speeds or name == BAR:
        return ""
    middle, low, high = spread([mine / bar for mine, bar in zip(speeds[name], speeds[BAR], strict=True)])
    return f"{middle:.2f}x  {low:.2f} - {high:.2f}"


def main() -> int:
    """Run the benchmark, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(PIPELINES), default=["pp2"], help="default: pp2")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    return measure(PIPELINES, arguments, take_turns, table)


if __name__ == "__main__":
    sys.exit(main())
