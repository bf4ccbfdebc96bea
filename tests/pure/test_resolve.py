"""Derived settings have Megatron-LM's values."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from itertools import chain

import pytest
from legal_run import argv, problems

from megatron.config.batch import (
    all_batch_sizes,
    batch_size_phases,
    final_batch_size,
    global_batch_size_at,
    iterations_for,
    samples_for,
)
from megatron.config.command_line.parse import parse
from megatron.config.notation import parse_steps
from megatron.config.pipeline import pipeline_chunks
from megatron.config.presets import PRESETS
from megatron.config.resolve import resolve
from megatron.config.rules import check
from megatron.config.schema import BatchConfig, BatchSettings, LayoutConfig, RunConfig


def resolved(change: str, world: int = 1) -> RunConfig:
    return parse(argv(change), program="t", world_size=world, check_disk=False).config


def test_derived_values_are_megatrons() -> None:
    c = resolved("", 4)
    assert (c.model.ffn_hidden_size, c.model.kv_channels, c.model.num_query_groups) == (64, 4, 4)
    assert (c.batch.global_batch_size, c.optim.lr_decay_iters, c.layout.pipeline_schedule) == (8, 10, "1f1b")
    assert (c.optim.start_weight_decay, c.optim.end_weight_decay) == (0.01, 0.01)
    assert c.log.metrics_path is None and resolved("--save d --save-interval 1").log.metrics_path == os.path.join(
        "d", "metrics.jsonl"
    )
    assert resolved("--position-embedding-type rope --no:max-position-embeddings").model.max_position_embeddings == 8


def test_the_schedule_follows_from_virtual_stages() -> None:
    virtual = "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage"
    assert resolved(f"{virtual} 1", 2).layout.pipeline_schedule == "interleaved"
    assert resolved("--pipeline-model-parallel-size 2", 2).layout.pipeline_schedule == "1f1b"
    assert pipeline_chunks(resolved(f"{virtual} 1", 2).layout, 4) == 2
    # Also where it leaves a rest, and never none.
    layout = LayoutConfig(pipeline_model_parallel_size=2, pipeline_schedule="interleaved")
    chunks = [pipeline_chunks(replace(layout, num_layers_per_virtual_pipeline_stage=n), 13) for n in (1, 2, 3, 4, 9)]
    assert chunks == [6, 3, 2, 1, 1]
    assert pipeline_chunks(replace(layout, pipeline_schedule="zb-v"), 13) == 2
    assert pipeline_chunks(replace(layout, pipeline_schedule="1f1b"), 13) == 1


def test_the_profile_goes_beside_the_checkpoints() -> None:
    assert resolved("").log.profile_pipeline is None
    assert resolved("--profile-pipeline").log.profile_pipeline == "pipeline_profile"
    assert resolved("--profile-pipeline --save d --save-interval 1").log.profile_pipeline == "d"
    assert resolved("--profile-pipeline p --save d --save-interval 1").log.profile_pipeline == "p"


@pytest.mark.parametrize(("hidden", "width"), [(4096, 10880), (1024, 2688), (5120, 13632), (16, 64)])
def test_swiglu_width(hidden: int, width: int) -> None:
    assert resolved(f"--swiglu --hidden-size {hidden}").model.ffn_hidden_size == width
    assert resolved(f"--swiglu --hidden-size {hidden} --ffn-hidden-size 96").model.ffn_hidden_size == 96


def test_iterations_follow_from_samples() -> None:
    c = resolved("--train-samples 1003 --no:train-iters --global-batch-size 10")
    assert (c.batch.train_iters, c.optim.lr_decay_samples, c.optim.lr_decay_iters) == (100, 1003, None)


def test_resolving_twice_changes_nothing_and_stays_legal() -> None:
    for change in ("", "--train-samples 100 --no:train-iters", "--swiglu --bf16 --save d --save-interval 2"):
        c = resolved(change)
        assert resolve(c) == c and check(c) == []


def test_ramp_up_arithmetic() -> None:
    # 16 to 48 in two steps of 16 over 320 samples: each size lasts 160 samples.
    batch = BatchConfig(micro_batch_size=2, global_batch_size=48, rampup_batch_size=(16, 16, 320))
    assert [global_batch_size_at(batch, n) for n in (0, 159, 160, 319, 320, 321, 10**9)] == [16, 16, 32, 32, 48, 48, 48]
    assert all_batch_sizes(batch) == [16, 32, 48] and all_batch_sizes(replace(batch, rampup_batch_size=())) == [48]
    assert global_batch_size_at(batch, 0) // 8 == 2 and global_batch_size_at(batch, 320) // 8 == 6
    # 10 steps of 16 reach 160, 5 of 32 reach 320, which is still within the ramp: one of 48, then 632 // 48 = 13.
    assert iterations_for(batch, 1000) == 10 + 5 + 1 + 13
    assert iterations_for(replace(batch, rampup_batch_size=()), 1000) == 20
    level = replace(batch, rampup_batch_size=(48, 16, 320))
    assert global_batch_size_at(level, 5) == 48
    with pytest.raises(ValueError, match="not resolved"):
        global_batch_size_at(BatchSettings(), 0)


def test_step_batch_size_schedule() -> None:
    """The sizes by samples, the last one as the global batch size, and what a run makes of them."""
    c = resolved("--step-batch-size-schedule 0:2 64:4,120:6 --no:train-iters --train-samples 31")
    assert c.batch.batch_size_steps == (0, 2, 8, 4, 15, 6) and c.batch.global_batch_size == 6
    # 4 steps of 2, 2 of 4 to sample 16, 2 of 6 to 28; three samples are left over.
    assert [global_batch_size_at(c.batch, n) for n in (0, 7, 8, 14, 15, 10**9)] == [2, 2, 4, 4, 6, 6]
    assert c.batch.train_iters == 8 and samples_for(c.batch, 8) == 28 and all_batch_sizes(c.batch) == [2, 4, 6]
    again = resolve(c)
    assert again == c and check(c) == []
    assert resolve(replace(c, batch=replace(c.batch, step_batch_size_schedule=()))).batch.batch_size_steps == ()


def test_a_batch_that_the_ranks_cannot_share_is_decreased() -> None:
    """With micro-batches of 2 on 3 ranks 10 samples become 6; the lengths of run and schedule stay those of 10."""
    decrease = "--decrease-batch-size-if-needed --global-batch-size 10"
    c = resolved(f"{decrease} --no:train-iters --train-samples 100", 3)
    assert (c.batch.global_batch_size, final_batch_size(c.batch), global_batch_size_at(c.batch, 7)) == (10, 6, 6)
    assert c.batch.train_iters == 10 and all_batch_sizes(c.batch) == [6] and [*batch_size_phases(c.batch)] == [(None, 6)]
    assert samples_for(resolved(decrease, 3).batch, 10) == 100
    assert final_batch_size(resolved(decrease, 5).batch) == 10 and resolve(c, 3) == c
    ramp = resolved(f"{decrease} --no:train-iters --train-samples 100 --rampup-batch-size 7 1 30", 3)
    assert [global_batch_size_at(ramp.batch, n) for n in (0, 10, 30)] == [6, 6, 6] and all_batch_sizes(ramp.batch) == [6] * 4
    notes = parse(argv(decrease), program="t", world_size=3, check_disk=False).notes
    assert notes == ("the global batch has 6 samples, not 10: it must be a multiple of 6",)
    too_few = (
        "`--global-batch-size 4` is not divisible by `--micro-batch-size 2` x 3 data-parallel ranks = 6; legal: multiples of 6"
    )
    assert problems("--decrease-batch-size-if-needed --global-batch-size 4", 3) == [too_few]
    begins = "begins with less than `--micro-batch-size 2` x 3 data-parallel ranks = 6"
    assert problems(f"{decrease} --no:train-iters --train-samples 100 --rampup-batch-size 4 2 30", 3) == [
        f"`--rampup-batch-size 4 2 30` {begins}"
    ]


def test_thresholds_have_suffixes() -> None:
    assert parse_steps(["0:768 250B:1536", "500b:3K,1.5T:6144"], 4096) == (
        (0, 768), (61035156, 1536), (122070312, 3000), (366210937, 6144),
    )  # fmt: skip
    assert parse_steps(["1e3:4 0.0:2"], 10) == ((0, 2), (100, 4))  # in any order


@pytest.mark.parametrize("seed", range(20))
def test_stretches_are_the_steps_of_a_walk(seed: int) -> None:
    random.seed(seed)
    sizes = [random.randint(1, 9) for _ in range(4)]
    begins = [0, *sorted(random.sample(range(1, 60), 3))]
    stepped = BatchSettings(global_batch_size=sizes[-1], batch_size_steps=tuple(chain(*zip(begins, sizes, strict=True))))
    ramp = BatchSettings(global_batch_size=8, rampup_batch_size=(2, 2, random.randint(1, 50)))
    for batch in (stepped, ramp):
        consumed, walk = 0, [0]
        for _ in range(80):
            consumed += global_batch_size_at(batch, consumed)
            walk.append(consumed)
        for start in (0, random.randint(0, 70)):
            counts = [size for steps, size in batch_size_phases(batch, start) for _ in range(80 if steps is None else steps)]
            at = start
            for size in counts[:80]:
                assert size == global_batch_size_at(batch, at)
                at += size
        assert [samples_for(batch, n) for n in range(80)] == walk[:80]
        for samples in range(walk[-1]):
            assert iterations_for(batch, samples) == max(n for n, done in enumerate(walk) if done <= samples)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_legal(name: str) -> None:
    sizes = ("num-layers", "hidden-size", "num-attention-heads", "max-position-embeddings")
    assert problems(" ".join(f"--no:{s}" for s in sizes) + f" --preset {name} --tensor-model-parallel-size 4", 4) == []
