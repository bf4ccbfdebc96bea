"""Layers to stages: every layer once, the busiest rank as idle as it can be, and a run's stages from its configuration."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, combinations, pairwise

import pytest
from legal_run import argv

from megatron.config.command_line.parse import parse
from megatron.config.options import by_name
from megatron.config.pipeline import pipeline_chunks
from megatron.config.schema import LayoutConfig, RunConfig
from megatron.contract import StagePart
from megatron.pipeline.partition import even_counts, ranges_from_counts, split_by_cost
from megatron.pipeline.schedules.schedule import SCHEDULES, looped, v_shaped
from megatron.plan.flops import head_flops, layer_flops
from megatron.plan.size import MetaModel
from megatron.plan.stages import StagePlan, plan_stages

PLACEMENTS = [looped(ranks, chunks) for ranks in range(1, 6) for chunks in (1, 2, 3)] + [v_shaped(r) for r in range(1, 6)]


def compositions(layers: int, stages: int) -> Iterator[list[int]]:
    """Every way to give each stage at least one layer."""
    for cuts in combinations(range(1, layers), stages - 1):
        yield [end - begin for begin, end in pairwise((0, *cuts, layers))]


def loads(work: Sequence[float], placement: Sequence[int]) -> list[float]:
    """The work of each rank, from that of each stage."""
    return [sum(w for w, owner in zip(work, placement, strict=True) if owner == rank) for rank in sorted(set(placement))]


def with_ends(counts: Sequence[float], first: float, last: float) -> list[float]:
    work = list(counts)
    work[0] += first
    work[-1] += last
    return work


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
@pytest.mark.parametrize("last", [0.0, 0.7, 2.0, 30.0])
def test_each_layer_is_in_one_stage_in_order(placement: tuple[int, ...], last: float) -> None:
    for layers in range(len(placement), 14):
        stages = split_by_cost([2.5] * layers, placement, last=2.5 * last)
        assert len(stages) == len(placement) and min(map(len, stages)) >= 1
        assert list(chain(*stages)) == list(range(layers))
        if last == 0.0:
            counts = list(map(len, stages))
            assert max(counts) - min(counts) <= 1
            if placement == looped(max(placement) + 1, len(placement) // (max(placement) + 1)):
                assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("placement", [p for p in PLACEMENTS if len(p) <= 6], ids=str)
def test_no_other_cut_has_less_work_for_the_busiest_rank(placement: tuple[int, ...]) -> None:
    """Nor, with as little work for it, less for the busiest stage."""

    def busiest(counts: Sequence[int], first: float, last: float) -> tuple[float, float]:
        work = with_ends(counts, first, last)
        return round(max(loads(work, placement)), 9), round(max(work), 9)

    for layers in range(len(placement), 12):
        for first, last in ((0.0, 0.0), (0.0, 0.4), (0.5, 1.0), (0.0, 4.5), (2.0, 0.0), (0.2, 3.0)):
            counts = even_counts(layers, 1.0, placement, first, last)
            best = min(busiest(c, first, last) for c in compositions(layers, len(placement)))
            assert busiest(counts, first, last) == best, (layers, first, last, counts)


def test_a_head_as_heavy_as_layers_takes_their_place() -> None:
    # 12 layers and a head of 4: two ranks of 8 each.
    assert split_by_cost([1.0] * 12, looped(2, 1), last=4.0) == (range(8), range(8, 12))
    # With two stages a rank, the stage that holds the head is the smaller one of its rank: 4, 3, 4, 1 + 4.
    assert split_by_cost([1.0] * 12, looped(2, 2), last=4.0) == (range(4), range(4, 7), range(7, 11), range(11, 12))
    # Down and up again: the head shares rank 0 with the first stage.
    assert even_counts(12, 1.0, v_shaped(2), last=4.0) == [3, 4, 4, 1]
    assert split_by_cost([1.0] * 4, looped(4, 1), last=100.0) == tuple(range(i, i + 1) for i in range(4))


@pytest.mark.parametrize("seed", range(20))
def test_unequal_layers_come_close_to_the_best_cut(seed: int) -> None:
    random.seed(seed)
    costs = [random.uniform(0.5, 2.0) for _ in range(10)]
    for ranks in (2, 3, 4):
        stages = split_by_cost(costs, looped(ranks, 1), last=1.5)
        assert list(chain(*stages)) == list(range(10)) and min(map(len, stages)) >= 1

        def busiest(counts: Sequence[int]) -> float:
            return max(with_ends([sum(costs[i] for i in stage) for stage in ranges_from_counts(counts)], 0.0, 1.5))

        best = min(busiest(counts) for counts in compositions(10, ranks))
        assert busiest([len(stage) for stage in stages]) <= best + max(costs)


def test_an_expensive_layer_gets_a_stage_of_its_own() -> None:
    assert split_by_cost([1.0, 1.0, 6.0, 1.0, 1.0, 1.0, 1.0], looped(2, 1)) == (range(3), range(3, 7))
    for costs in ([10.0, 1.0, 1.0], [1.0, 9.0, 1.0], [1.0, 1.0, 10.0]):  # and the others keep one each
        assert split_by_cost(costs, looped(3, 1)) == (range(1), range(1, 2), range(2, 3))


def test_layers_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match="2 layers cannot be cut into 3 stages of at least one layer"):
        split_by_cost([1.0, 1.0], (0, 1, 2))
    with pytest.raises(ValueError, match="must cost more than 0"):
        split_by_cost([1.0, 0.0], (0, 1))
    with pytest.raises(ValueError, match="ends of the model at least 0"):
        split_by_cost([1.0, 1.0], (0, 1), last=-1.0)


def test_given_counts_become_ranges() -> None:
    assert ranges_from_counts([0, 3, 2]) == (range(0), range(3), range(3, 5))


# Stages of a run. A vocabulary of one token makes the head free; VOCAB makes it as heavy as two layers.
SIZES = "--hidden-size 16 --num-attention-heads 4 --seq-length 8 --max-position-embeddings 8"


def plan(change: str, world: int, vocab: int = 1) -> StagePlan:
    config = parse(argv(f"{SIZES} {change}"), program="t", world_size=world, check_disk=False).config
    return plan_stages(with_vocabulary(config, vocab))


def with_vocabulary(config: RunConfig, vocab: int) -> RunConfig:
    return replace(config, model=replace(config.model, vocab_size=vocab))


def test_one_rank_has_the_whole_model() -> None:
    assert plan("", 1) == StagePlan((0,), (StagePart(range(2), True, True),), 1)
    assert plan("", 1).stages_on(0) == (0,)


def test_a_plan_has_the_head_at_its_end() -> None:
    found = plan("--num-layers 6 --pipeline-model-parallel-size 2", 2)
    assert found == StagePlan((0, 1), (StagePart(range(3), True, False), StagePart(range(3, 6), False, True)), 1)
    config = parse(argv(SIZES), program="t", check_disk=False).config
    model = MetaModel(replace(config.model, vocab_size=1))
    layer, token = layer_flops(model, 8, StagePart(range(1))).total, head_flops(model, 8, model.whole)
    heavy = plan("--num-layers 6 --pipeline-model-parallel-size 2", 2, vocab=2 * layer // token)
    assert [part.layers for part in heavy.parts] == [range(4), range(4, 6)]


def test_an_explicit_cut_is_followed() -> None:
    found = plan("--num-layers 6 --pipeline-model-parallel-size 3 --pipeline-stage-layers 0 5 1", 3, vocab=10**6)
    assert [part.layers for part in found.parts] == [range(0), range(5), range(5, 6)]
    assert [(part.embedding, part.head) for part in found.parts] == [(True, False), (False, False), (False, True)]


@pytest.mark.parametrize("ranks", range(2, 6))
@pytest.mark.parametrize("per_stage", [1, 2, 3])
def test_virtual_stages_cover_all_layers_in_order(ranks: int, per_stage: int) -> None:
    for layers in range(ranks, 14):
        found = plan(
            f"--num-layers {layers} --pipeline-model-parallel-size {ranks} --num-layers-per-virtual-pipeline-stage {per_stage}",
            ranks,
        )
        assert found.chunks == max(1, layers // (ranks * per_stage))
        assert found.placement == looped(ranks, found.chunks)
        assert list(chain(*(part.layers for part in found.parts))) == list(range(layers))
        if layers == ranks * per_stage * found.chunks:  # as Megatron-LM cuts
            assert {len(part.layers) for part in found.parts} == {per_stage}
        assert [s for r in range(ranks) for s in found.stages_on(r)] == sorted(
            range(len(found.parts)), key=lambda s: (found.placement[s], s)
        )


def test_the_configuration_knows_the_schedules() -> None:
    assert by_name()["layout.pipeline_schedule"].choices == tuple(SCHEDULES)
    for name, kind in SCHEDULES.items():
        chunks = pipeline_chunks(LayoutConfig(2, 2, pipeline_schedule=name, num_layers_per_virtual_pipeline_stage=1), 6)
        assert chunks == (3 if kind.chunks is None else kind.chunks), name
    assert {name for name, kind in SCHEDULES.items() if kind.splits} == {n for n in SCHEDULES if n.startswith("zb-")}


def test_zb_v_comes_back_to_the_first_rank() -> None:
    found = plan("--num-layers 8 --pipeline-model-parallel-size 2 --pipeline-schedule zb-v", 2)
    assert (found.placement, found.chunks) == ((0, 1, 1, 0), 2)
    assert [len(part.layers) for part in found.parts] == [2, 2, 2, 2]
    assert found.stages_on(0) == (0, 3) and found.parts[3].head and not found.parts[3].embedding
