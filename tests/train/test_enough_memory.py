"""A run that cannot fit is refused before anything is allocated, in numbers; one that may fit is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron.config.command_line.parse import parse
from megatron.config.schema import RunConfig
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.errors import InputError
from megatron.mesh.grid import Grid
from megatron.plan import enough_memory
from megatron.plan.enough_memory import FreeMemory, check_memory, rank_states
from megatron.train.job_runner import explain_error

GIB = 2**30
COMMAND = (
    "--preset gpt-8.3b --seq-length 8 --micro-batch-size 1 --train-iters 9 --lr 1 --tokenizer-type ByteTokenizer --data-path x"
)


def parse_config(flags: str = "", world: int = 1) -> RunConfig:
    words = f"{COMMAND} {flags}".split()
    parsed = parse(words, program="p", world_size=world, check_disk=False)
    return replace(parsed.config, model=replace(parsed.config.model, vocab_size=50257))


def state(config: RunConfig, world: int, rank: int = 0) -> int:
    return rank_states(config, Grid.from_layout(config.layout, world), [rank])[0].total


@pytest.fixture(autouse=True)
def tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enough_memory, "RELEASE_SECONDS", 0.0)


def memory_refusal(config: RunConfig, env: LaunchEnvironment, free: int, *, own: bool = False) -> str:
    """Return the message of a run where so many bytes are free; nothing where the run may begin."""
    try:
        check_memory(config, env, lambda config, env: FreeMemory(free, "there is what there is", own))
    except InputError as error:
        return str(error)
    return ""


def test_what_is_needed_and_what_is_there() -> None:
    config = parse_config()
    need = state(config, 1)
    assert 16 * 8.2e9 < need < 16 * 8.5e9  # weights, gradients and two moments in fp32
    said = memory_refusal(config, LaunchEnvironment(), need - 1)
    assert said.startswith(f"out of memory before the start: one process would hold {need / GIB:.1f} GiB without activations")
    assert f"weights {need / 4 / GIB:.1f} GiB" in said and "there is what there is" in said
    for flag in ("--num-layers", "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--dry-run"):
        assert flag in said
    assert memory_refusal(config, LaunchEnvironment(), need) == ""


def test_an_evaluation_holds_weights_alone() -> None:
    config = parse_config()
    only = replace(config, eval=replace(config.eval, skip_train=True))
    assert state(only, 1) == state(config, 1) // 4
    assert "gradients" not in memory_refusal(only, LaunchEnvironment(), 1)


def test_the_ranks_of_a_host_share_its_memory() -> None:
    """Two hosts of two ranks, each host with a stage of its own; one rank of each host asks for both."""
    config = parse_config("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", 4)
    first, second = (state(config, 4, rank) for rank in (0, 2))
    assert first != second
    for rank, need in ((0, 2 * first), (2, 2 * second)):
        env = LaunchEnvironment(rank, 4, 0, 2, "torchrun")
        assert "the 2 ranks of this host" in memory_refusal(config, env, need - 1) and memory_refusal(config, env, need) == ""
        assert memory_refusal(config, LaunchEnvironment(rank + 1, 4, 1, 2, "torchrun"), 0) == ""
        srun = replace(env, launcher="srun")  # which may have dealt its ranks out: the least that they can be
        assert memory_refusal(config, srun, 2 * min(first, second)) == "" and memory_refusal(
            config, srun, 2 * min(first, second) - 1
        )


def test_a_gpu_is_one_ranks_own() -> None:
    config = parse_config("--tensor-model-parallel-size 2", 2)
    need = state(config, 2)
    for rank in (0, 1):
        env = LaunchEnvironment(rank, 2, rank, 2, "torchrun")
        assert memory_refusal(config, env, need - 1, own=True).startswith(
            "out of memory before the start: this rank would hold"
        )
        assert memory_refusal(config, env, need, own=True) == ""


def test_what_a_dying_process_gives_back_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enough_memory, "RELEASE_SECONDS", 5.0)
    rooms = [FreeMemory(0, "", True), FreeMemory(0, "", True), FreeMemory(state(parse_config(), 1), "", True)]
    check_memory(parse_config(), LaunchEnvironment(), lambda config, env: rooms.pop(0))
    assert not rooms


def test_an_allocation_that_fails_later_is_said_in_a_line() -> None:
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        said = explain_error(error, "rank 0 on host h, forward")
    assert said is not None and said.startswith("rank 0 on host h, forward: out of memory: ") and "\n" not in said
    assert "--micro-batch-size" in said and "--recompute-activations" in said
