"""Training tokens per second, side by side in one run: this framework against what else trains the same model.

    python benchmarks/train.py                                   all cases of the device at hand
    python benchmarks/train.py --cases small dp2 --rounds 9 --json results.json

All contenders of a case live in the same processes and take turns, round by round, so that a slow minute of the machine
falls on all of them. A figure is the median over rounds, a ratio the median of the ratios within each round; the ranges are
the smallest and the largest. Every contender's loss is printed too: equal work must bring equal losses.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import ours
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import CASES, Case

from megatron.mesh.launch import Job, job
from megatron.mesh.place import Place
from megatron.train.report import peak_tflops

CONTENDERS: dict[str, Callable[[Case, Job], baselines.Step]] = {
    "ours": ours.ours,
    "ours-ddp": ours.ours_in_ddp,
    "transformers": baselines.transformers,
    "transformers-ddp": partial(baselines.transformers, ddp=True),
    "plain-torch": baselines.plain,
    "dtensor": baselines.dtensor,
}


def settle(device: torch.device) -> None:
    """Wait until all work of all ranks is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if dist.is_initialized():
        dist.barrier()


def measure(rank: int, name: str, rounds: int, port: int, output: str) -> None:
    """One rank of one case; rank 0 writes what was measured."""
    case = CASES[name]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks), LOCAL_WORLD_SIZE=str(case.ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with job(Place.of(os.environ)) as started:
        torch.set_num_threads(case.threads)
        torch.manual_seed(1234)
        steps = {contender: CONTENDERS[contender](case, started) for contender in case.contenders}
        result = take_turns(case, steps, rounds, started)
        if rank == 0:
            Path(output).write_text(json.dumps(result), encoding="utf-8")


def take_turns(case: Case, steps: dict[str, baselines.Step], rounds: int, started: Job) -> dict[str, Any]:
    """Tokens per second over all ranks, and the loss, of every contender in every round."""
    device, dims = started.device, case.dims
    # Tensor-parallel ranks share their data, data-parallel ranks do not.
    draw = torch.Generator().manual_seed(started.place.rank // case.tp)
    text = torch.randint(dims.vocab, (dims.micro_batch, dims.seq + 1), generator=draw).to(device)
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    losses = {contender: [step(tokens, labels)] for contender, step in steps.items()}  # also the warm-up, and compilation
    speeds: dict[str, list[float]] = {contender: [] for contender in steps}
    order = list(steps)
    for turn in range(rounds):
        for contender in order[turn % len(order) :] + order[: turn % len(order)]:
            settle(device)
            begun = time.perf_counter()
            for _ in range(case.steps):
                loss = steps[contender](tokens, labels)
            settle(device)
            speeds[contender].append(case.steps * case.tokens_per_step / (time.perf_counter() - begun))
            losses[contender].append(loss)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {case.threads} thread(s) a rank"
    return {"chip": chip, "peak_tflops": peak_tflops(device, None), "tokens_per_second": speeds, "losses": losses}


def run_case(name: str, rounds: int) -> dict[str, Any]:
    """Measure one case in fresh processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        mp.spawn(measure, args=(name, rounds, port, str(output)), nprocs=CASES[name].ranks)
        result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return {"case": name, **asdict(CASES[name]), **result}


def spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def table(result: dict[str, Any]) -> str:
    """What a person reads of one case."""
    case, speeds = CASES[result["case"]], result["tokens_per_second"]
    peak = result["peak_tflops"]
    lines = [f"{result['case']}: {case.title} ({result['chip']})"]
    lines.append(f"  {'':18}{'tokens/s':>10}  {'range':>19}   {'ours is':>8}  {'range':>13}   {'loss':>15}")
    for name, values in speeds.items():
        middle, low, high = spread(values)
        first, last = result["losses"][name][0], result["losses"][name][-1]
        line = f"  {name:18}{middle:10,.0f}  {f'{low:,.0f} - {high:,.0f}':>19}"
        if name == "ours":
            line += " " * 27
        else:
            ratio, worst, best = spread([mine / theirs for mine, theirs in zip(speeds["ours"], values, strict=True)])
            line += f"   {ratio:7.2f}x  {f'{worst:.2f} - {best:.2f}':>13}"
        line += f"   {f'{first:.3f} -> {last:.3f}':>15}"
        if peak is not None:
            line += f"   MFU {middle * case.dims.flops_per_token / (peak * 1e12 * case.ranks):.1%}"
        lines.append(line)
    if peak is not None:
        lines.append(f"  MFU against {peak:g} TFLOP/s, the dense bf16 peak; {case.dims.flops_per_token:.4g} FLOP a token")
    return "\n".join(lines)


def main() -> int:
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
    results = []
    for name in arguments.cases:
        results.append(run_case(name, arguments.rounds))
        print(table(results[-1]) + "\n", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
