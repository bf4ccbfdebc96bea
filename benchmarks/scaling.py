"""Scaling of this framework from one rank to two, along each parallel axis, side by side in one run.

    python benchmarks/scaling.py                              all axes, the small model
    python benchmarks/scaling.py --cases tp sp --rounds 9 --json results.json

Every rank has one thread. *Strong*: two ranks share the step that one rank makes alone. *Weak*: two ranks make a step of twice
the work: twice the rows, or for context parallelism twice the length. The efficiency is the FLOP/s of two ranks over twice
those of one. A pipeline's is also shown without the bubble, which is (p - 1) / (m + p - 1) of a step of m micro-batches on p
stages (arXiv 2104.04473). Layouts take turns, round by round, as in train.py: an efficiency is the median of those within each
round.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cases import CASES, Case
from train import Contest, measure, spread

SMALL = replace(CASES["small"], contenders=("ours",), threads=1)


def with_dims(case: Case, **dims: int) -> Case:
    """Return the case with other dimensions."""
    return replace(case, dims=replace(case.dims, **dims))


@dataclass(frozen=True)
class Scaling:
    """One axis: the step of one rank, the same on two, and one of twice the work on two."""

    title: str
    one: Case
    strong: Case
    weak: Case


ROWS = SMALL.dims.micro_batch
TP = replace(SMALL, tp=2)
SP = replace(TP, sequence_parallel=True)
DP = replace(SMALL, dp=2)
PIPELINE = replace(with_dims(SMALL, micro_batch=1), micro_batches=8)
PP = replace(PIPELINE, pp=2)
CP = replace(SMALL, cp=2)
AXES = {
    "tp": Scaling("tensor parallelism", SMALL, TP, with_dims(TP, micro_batch=2 * ROWS)),
    "sp": Scaling("tensor and sequence parallelism", SMALL, SP, with_dims(SP, micro_batch=2 * ROWS)),
    "pp": Scaling("pipeline parallelism, 8 micro-batches", PIPELINE, PP, with_dims(PP, micro_batch=2)),
    "dp": Scaling("data parallelism", SMALL, with_dims(DP, micro_batch=ROWS // 2), DP),
    "cp": Scaling("context parallelism", SMALL, CP, with_dims(CP, seq=2 * SMALL.dims.seq)),
}


def bubble(case: Case) -> float:
    """Return the share of a step in which a rank of the pipeline waits."""
    return (case.pp - 1) / (case.micro_batches + case.pp - 1)


def take_turns(scaling: Scaling, rounds: int) -> dict[str, Any]:
    """Measure FLOP/s of each of the three steps in every round, and their losses."""
    cases = {"one": scaling.one, "strong": scaling.strong, "weak": scaling.weak}
    rates: dict[str, list[float]] = {name: [] for name in cases}
    with ExitStack() as stack:
        contests = {name: stack.enter_context(Contest(case)) for name, case in cases.items()}
        losses = {name: [contest.warm_up("ours").loss] for name, contest in contests.items()}
        order = list(cases)
        for first in range(rounds):
            first %= len(order)
            for name in order[first:] + order[:first]:
                case, answer = cases[name], contests[name].turn("ours")
                rates[name].append(case.steps * case.tokens_per_step * case.dims.flops_per_token / answer.seconds)
                losses[name].append(answer.loss)
    return {"flops_per_second": rates, "losses": losses}


def table(result: dict[str, Any]) -> str:
    """Format the result of one axis as a table."""
    scaling, rates = AXES[result["case"]], result["flops_per_second"]
    lines = [f"{result['case']}: {scaling.title}"]
    lines.append(f"  {'':8}{'GFLOP/s':>9}   {'efficiency':>10}   {'range':>13}   {'no bubble':>9}   {'loss':>16}")
    for name, values in rates.items():
        line = f"  {name:8}{spread(values)[0] / 1e9:9.1f}"
        if name == "one":
            line += " " * 45
        else:
            middle, low, high = spread([two / (2 * one) for two, one in zip(values, rates["one"], strict=True)])
            share = bubble(getattr(scaling, name))
            line += f"   {middle:10.1%}   {f'{low:.1%} - {high:.1%}':>13}   {f'{middle / (1 - share):.1%}' if share else '':>9}"
        first, last = result["losses"][name][0], result["losses"][name][-1]
        lines.append(line + f"   {f'{first:.4f} -> {last:.4f}':>16}")
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(AXES), default=list(AXES), help="axes (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each layout")
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    return measure(AXES, arguments, take_turns, table)


if __name__ == "__main__":
    sys.exit(main())
