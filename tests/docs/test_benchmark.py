"""The benchmark compares like with like: at one small size, every contender learns the same text at the same pace.

What is said of its processes is said of the real ones: who has no turn computes nothing, and a failure ends them all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist
from ranks import on_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import ours
import pipeline
import train as benchmark
from cases import CASES, PIPELINES, Case, Dims
from pipelined import without_broken

from megatron.config.resolve import resolve_model
from megatron.config.schema import ModelSettings
from megatron.pipeline.schedules.schedule import Action, Op
from megatron.plan.flops import causal_flops_per_token, flops_per_token
from megatron.plan.size import MetaModel

TINY = Dims(layers=2, width=32, heads=4, seq=16, vocab=96, micro_batch=4)
SMALL = replace(CASES["small"], dims=TINY, steps=6, threads=1)


def check_equal_work(losses: dict[str, list[float]]) -> None:
    """Compare the contenders by the losses of their first step and their last."""
    for contender, (first, *_, last) in losses.items():
        assert first == pytest.approx(4.56, abs=0.1), f"{contender} does not begin at ln 96"
        assert last < first - 0.002, f"{contender} does not learn"
        assert last - first == pytest.approx(losses["ours"][-1] - losses["ours"][0], rel=0.5), contender


def losses_here(case: Case, contender: str) -> list[float]:
    """Twelve steps of a contender on this rank, whose process group is there already and stays."""
    place = {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": str(case.ranks)}
    there, stays = patch.object(dist, "init_process_group"), patch.object(dist, "destroy_process_group")
    with patch.dict(os.environ, place), there, stays, benchmark.CONTENDERS[contender](case) as step:
        text = benchmark.random_text(case, dist.get_rank())
        return [benchmark.turn(step, text, steps, "cpu").loss for steps in (1, 6, 6)]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.device == "cpu" and case.ranks > 1])
def test_contenders_do_equal_work(name: str) -> None:
    case = replace(CASES[name], dims=TINY)
    check_equal_work({contender: on_ranks(case.ranks, losses_here, case, contender)[0] for contender in case.contenders})


@pytest.mark.parametrize("name", ["gpu-345m-fusion", "gpu-345m-adam"])
def test_options_of_ours_do_equal_work(name: str) -> None:
    """The contenders of a GPU are built on a CPU, with the same losses, since only number formats and kernels differ."""
    case = replace(CASES[name], dims=TINY, device="cpu", steps=2)
    losses = {}
    for contender in case.contenders:
        with benchmark.CONTENDERS[contender](case) as step:
            text = benchmark.random_text(case, 0)
            losses[contender] = [benchmark.turn(step, text, steps, "cpu").loss for steps in (1, 6, 6)]
    first = losses[case.contenders[0]]
    assert first[-1] < first[0] - 0.002
    assert all(other == pytest.approx(first, abs=1e-5) for other in losses.values())
    shown = {"case": name, "chip": "NVIDIA H200", "peak_tflops": 989.0, "losses": losses}
    table = benchmark.table({**shown, "tokens_per_second": {contender: [1.0, 2.0] for contender in losses}})
    assert f"{case.contenders[0]} is" in table and table.count("1.00x") == len(case.contenders) - 1


def test_options_of_ours_are_those_of_a_command_line() -> None:
    """On a GPU, which a configuration does not need."""
    case, options = CASES["gpu-345m-fusion"], ours.Options
    precision = [ours.build_config(case, options=o).precision for o in (options(), options(fusion=False, bf16_gradients=True))]
    assert [(p.bf16, p.grad_reduce_in_bf16, p.gradient_accumulation_fusion) for p in precision] == [
        (True, False, True),
        (True, True, False),
    ]
    assert [ours.build_config(case, options=options(eager=e)).batch.compile for e in (True, False)] == [False, True]
    assert ours.build_config(case, options=options(kernel="foreach")).optim.adam_kernel == "foreach"


def stat(process: Path) -> list[str]:
    """proc(5)'s fields of a process from the third on: its state."""
    return (process / "stat").read_text().rpartition(")")[2].split()


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, all its threads together."""
    fields = stat(Path(f"/proc/{pid}"))
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def running_in(session: int) -> list[str]:
    """Processes of a session, without the dead that nobody has asked about."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            fields = stat(process)
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(process.name)
    return found


def test_one_contender_works_at_a_time() -> None:
    with benchmark.Contest(SMALL) as contest:
        losses = {contender: [contest.warm_up(contender).loss] for contender in SMALL.contenders}
        used: dict[tuple[str, str], float] = {}
        for active in SMALL.contenders:
            before = {rank.contender: cpu_seconds(rank.process.pid) for rank in contest.ranks}
            for _ in range(8):
                answer = contest.turn(active)
                assert 0 < answer.seconds < 60
                losses[active].append(answer.loss)
            used |= {(active, r.contender): cpu_seconds(r.process.pid) - before[r.contender] for r in contest.ranks}
    assert set(losses) == {"ours", "transformers-stock", "transformers", "plain-torch"}
    check_equal_work(losses)
    for (active, contender), seconds in used.items():
        assert seconds >= 0.05 if contender == active else seconds <= 0.02, f"{contender} used {seconds} s in {active}'s turns"
    assert [rank.process.exitcode for rank in contest.ranks] == [0] * 4


def test_an_error_ends_the_contest_in_its_own_words() -> None:
    torn = replace(SMALL, contenders=("plain-torch",), dims=replace(TINY, heads=5))
    with pytest.raises(benchmark.Failure, match=r"(?s)rank 0 of plain-torch failed\nTraceback.*RuntimeError.*unflatten"):
        benchmark.take_turns(torn, 1)


def test_a_dead_rank_ends_the_contest() -> None:
    case = replace(CASES["dp2"], dims=TINY, contenders=("ours-ddp",))
    contest = benchmark.Contest(case)
    with pytest.raises(benchmark.Failure, match=r"rank [01] of ours-ddp (ended .* exit code -9|failed)"), contest:
        contest.warm_up("ours-ddp")
        contest.ranks[1].process.kill()
        contest.turn("ours-ddp")
    # The other one may have seen the death before it was ended itself.
    assert contest.ranks[1].process.exitcode == -signal.SIGKILL and contest.ranks[0].process.exitcode in (1, -signal.SIGKILL)


def test_an_interrupt_leaves_no_process_behind() -> None:
    command = [sys.executable, benchmark.__file__, "--cases", "small"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as conductor:
        children = Path(f"/proc/{conductor.pid}/task/{conductor.pid}/children")
        deadline = time.monotonic() + 60
        while len(children.read_text().split()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(running_in(conductor.pid)) >= 2, "no contender was started"  # not all are: nothing of the interrupt is lost
        os.killpg(conductor.pid, signal.SIGINT)  # to all of them, as a terminal does
        _, said = conductor.communicate(timeout=60)
    assert (conductor.returncode, said) == (130, "error: interrupted\n")
    while (left := running_in(conductor.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)  # multiprocessing's tracker of resources ends a moment after the conductor
    assert not left


def test_the_table_names_ratios_and_losses() -> None:
    speeds = {"ours": [200.0, 220.0, 210.0], "transformers": [100.0, 100.0, 100.0], "plain-torch": [210.0, 210.0, 210.0]}
    losses = {name: [9.0, 8.0] for name in speeds}
    result = {"case": "small", "chip": "CPU", "peak_tflops": None, "tokens_per_second": speeds, "losses": losses}
    lines = benchmark.table(result).splitlines()
    assert "2.10x" in lines[3]
    assert "2.00 - 2.20" in lines[3]
    assert all("9.000 -> 8.000" in line for line in lines[2:])
    assert "MFU" not in lines[2]
    assert "MFU" in benchmark.table({**result, "chip": "NVIDIA H200", "peak_tflops": 989.0})


PIPELINE = replace(PIPELINES["pp2"], dims=replace(TINY, layers=5, micro_batch=2), micro_batches=4, steps=2)


def pipeline_losses_here(case: Case, contender: str) -> list[float]:
    """As `losses_here`; the passes alone come between the steps, and must leave nothing behind."""
    place = {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": str(case.ranks)}
    there, stays = patch.object(dist, "init_process_group"), patch.object(dist, "destroy_process_group")
    with patch.dict(os.environ, place), there, stays, pipeline.ready_for_turns(contender, case, dist.get_rank()) as take:
        losses = [take("warm up").loss]
        for _ in range(6):
            losses.append(take("steps").loss)
            take("gradients")
        return losses


def test_pipelines_do_equal_work() -> None:
    contenders = without_broken(PIPELINE).contenders
    losses = {name: on_ranks(2, pipeline_losses_here, PIPELINE, name) for name in contenders}
    for ranks in losses.values():
        assert ranks[0] == ranks[1]
        assert ranks[0][-1] < ranks[0][0] - 0.002
    assert len(losses) >= 7
    first = {name: ranks[0] for name, ranks in losses.items()}
    pipeline.check_losses(first)
    with pytest.raises(benchmark.Failure, match=r"not do equal work; losses after turn 1: .*, torch-1f1b 4\.5"):
        pipeline.check_losses({**first, "torch-1f1b": [first["torch-1f1b"][0], 4.5, *first["torch-1f1b"][2:]]})


def test_a_contender_that_torch_cannot_run_is_left_out() -> None:
    assert "torch-zb-v" not in without_broken(PIPELINE, "2.11.0+cu130").contenders
    assert len(without_broken(PIPELINE, "2.11.0+cu130").contenders) == 7
    assert without_broken(PIPELINE, "2.13.0") == PIPELINE


def test_pipelines_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    contenders = ("ours-zb-h1", "torch-1f1b")
    result = {"case": "pp2", **pipeline.take_turns(replace(PIPELINE, contenders=contenders), 2)}
    assert {name: len(losses) for name, losses in result["losses"].items()} == dict.fromkeys(contenders, 3)
    assert len(result["overheads"]["ours-zb-h1"]) == 2 * PIPELINE.steps
    assert all(over > 0 for over in result["overheads"]["ours-zb-h1"])
    zero_bubble, bar = pipeline.table(result).splitlines()[3:5]
    assert zero_bubble.split()[:2] == ["ours-zb-h1", "3-2"]
    assert zero_bubble.count("x  ") == 2
    assert "x  " not in bar
    assert pipeline.against({"ours-1f1b": [150.0, 140.0], "torch-1f1b": [100.0, 100.0]}, "ours-1f1b") == "1.45x  1.40 - 1.50"


def test_overhead_is_what_the_simulator_does_not_explain() -> None:
    case = replace(PIPELINE, micro_batches=2)
    schedule = pipeline.build_schedule(case, "ours-1f1b")
    cost = {Op.F: 1.0, Op.B: 2.0}
    # By hand: F0 F1 on rank 0 until 2, F0 B0 on rank 1 from 1 to 4, then F1 B1 until 7, B1 on rank 0 until 9.
    ranks = [{action: cost[action.op] for action in program} for program in schedule.programs]
    passes = [pipeline.Pass(10.5, 19.9, ranks[0]), pipeline.Pass(10.0, 17.0, ranks[1])]
    assert pipeline.overhead(schedule, passes) == pytest.approx(0.1)
    assert pipeline.typical_overhead(schedule, [passes] * 3) == pytest.approx(0.1)
    slow = [replace(passes[0], seconds={**ranks[0], Action(Op.F, 0, 0): 2.0}), passes[1]]
    assert pipeline.overhead(schedule, slow) == pytest.approx(-0.01), "the first forward delays everything by one"
    assert pipeline.typical_overhead(schedule, [passes, passes, slow]) == pytest.approx(0.1), "medians forget what is rare"


@pytest.mark.parametrize("name", sorted(CASES))
def test_flops_are_those_of_the_package(name: str) -> None:
    dims = CASES[name].dims
    model = ModelSettings(
        num_layers=dims.layers, hidden_size=dims.width, num_attention_heads=dims.heads, max_position_embeddings=dims.seq
    )
    model = MetaModel(replace(resolve_model(model), vocab_size=dims.vocab))
    assert dims.flops_per_token == pytest.approx(flops_per_token(model, dims.seq), rel=1e-9)
    assert dims.causal_flops_per_token == pytest.approx(causal_flops_per_token(model, dims.seq), rel=1e-9)
