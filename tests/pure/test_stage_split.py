"""The layers of pipeline stages where Megatron-LM's flags say them: its numbers, and each contradiction in words."""

from __future__ import annotations

from dataclasses import replace

import pytest
from legal_run import argv, problems

from megatron.config.command_line.parse import parse
from megatron.config.command_line.saved import from_json, to_json
from megatron.config.notation import parse_layout
from megatron.config.resolve import resolve
from megatron.plan.stages import StagePlan, plan_stages

PP = "--pipeline-model-parallel-size"
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
EMBEDDING, LOSS = "--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"
COUNT, EACH = "--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage"
DRAWN = "--pipeline-model-parallel-layout"


def plan(change: str, ranks: int) -> tuple[str | None, StagePlan]:
    """Schedule and stages, with a head that would weigh as much as many layers if the stages were cut by work."""
    config = parse(argv(f"{PP} {ranks} {change}"), program="t", world_size=ranks, check_disk=False).config
    assert resolve(from_json(to_json(config))) == config
    return config.layout.pipeline_schedule, plan_stages(replace(config, model=replace(config.model, vocab_size=10**6)))


@pytest.mark.parametrize(
    ("ranks", "change", "schedule", "layers"),
    [
        (4, f"--num-layers 12 {FIRST} 2 {LAST} 2", "1f1b", [2, 4, 4, 2]),
        (4, f"--num-layers 10 {FIRST} 1", "1f1b", [1, 3, 3, 3]),
        (4, f"--num-layers 10 {LAST} 4", "1f1b", [2, 2, 2, 4]),
        (2, f"--num-layers 6 {FIRST} 5 {LAST} 1", "1f1b", [5, 1]),
        (2, f"--num-layers 8 {FIRST} 3 --pipeline-schedule zb-h1", "zb-h1", [3, 5]),
        # All stages of a rank together: rank 0 has 2 + 2, rank 1 has 1 + 1.
        (2, f"--num-layers 6 {LAST} 2 {COUNT} 2", "interleaved", [2, 1, 2, 1]),
        # Down the ranks and up again: the first rank has the first and the last stage.
        (2, f"--num-layers 8 {FIRST} 2 --pipeline-schedule zb-v", "zb-v", [1, 3, 3, 1]),
        (4, f"--num-layers 6 {EMBEDDING} {LOSS} {COUNT} 2", "interleaved", [0, 1, 1, 1, 1, 1, 1, 0]),
        (4, f"--num-layers 14 {EMBEDDING} {LOSS} {EACH} 2", "interleaved", [1, 2, 2, 2, 2, 2, 2, 1]),
        (2, f"--num-layers 7 {EMBEDDING} --pipeline-schedule gpipe", "gpipe", [3, 4]),
        (2, f"--num-layers 7 {LOSS}", "1f1b", [4, 3]),
        (2, f"--num-layers 6 {EMBEDDING} {LOSS} --pipeline-schedule zb-v {COUNT} 2", "zb-v", [1, 2, 2, 1]),
        (2, f"--num-layers 8 {DRAWN} Et*3|(tt|)*2,tL", "interleaved", [3, 2, 2, 1]),
        (2, f"--num-layers 8 {DRAWN} E|t*8L", "1f1b", [0, 8]),
        (2, f"--num-layers 8 {DRAWN} E|tttt|tttt|L --pipeline-schedule zb-v", "zb-v", [0, 4, 4, 0]),
        (1, f"--num-layers 3 {EMBEDDING} {LOSS}", "1f1b", [3]),
    ],
)
def test_stages_are_megatrons(ranks: int, change: str, schedule: str, layers: list[int]) -> None:
    name, found = plan(change, ranks)
    assert (name, [len(part.layers) for part in found.parts]) == (schedule, layers)
    assert [layer for part in found.parts for layer in part.layers] == list(range(sum(layers)))


def test_virtual_stages_by_their_number_are_cut_by_work() -> None:
    name, found = plan(f"--num-layers 8 {COUNT} 3", 2)
    assert (name, found.chunks, found.placement) == ("interleaved", 3, (0, 1, 0, 1, 0, 1))
    assert plan(f"--num-layers 8 {COUNT} 1", 2)[0] == "1f1b"


MORE = "; legal: also --pipeline-stage-layers, the layers of each stage"
CASES = [
    (
        4,
        f"--num-layers 10 {LAST} 3",
        f"`{LAST} 3` cannot be met: 7 of `--num-layers 10` are left, which the other 3 pipeline ranks cannot share "
        f"evenly{MORE}",
    ),
    (
        2,
        f"--num-layers 6 {FIRST} 1 {LAST} 4",
        f"`{FIRST} 1` and `{LAST} 4` cannot be met: all pipeline ranks together have 5 layers, not `--num-layers 6`{MORE}",
    ),
    (
        1,
        f"{FIRST} 1 {LAST} 1",
        f"`{FIRST} 1` and `{LAST} 1` cannot be met: one pipeline rank is the first and the last; `{PP}` of at least 2 is "
        f"needed{MORE}",
    ),
    (
        4,
        f"--num-layers 16 {EMBEDDING} {LOSS}",
        f"`{EMBEDDING}` and `{LOSS}` cannot be met: 18 layers, with embedding or loss counted as one, are not divisible by 4 "
        f"pipeline ranks{MORE}",
    ),
    (
        2,
        f"--num-layers 8 {FIRST} 3 --pipeline-schedule zb-v",
        f"`{FIRST} 3` cannot be met: a rank has 3 layers, not divisible by its 2 stages{MORE}",
    ),
    (2, f"--num-layers 8 {FIRST} 0", f"`{FIRST} 0` must be greater than 0"),
    (
        2,
        f"--num-layers 8 {COUNT} 2 {EACH} 2",
        f"`{EACH} 2` and `{COUNT} 2` exclude each other: each sets how many stages a rank has; give one of them",
    ),
    (
        2,
        f"--num-layers 8 {COUNT} 3 --pipeline-schedule zb-v",
        f"`--pipeline-schedule zb-v` always has 2 virtual stages on each rank, and conflicts with `{COUNT} 3`; legal: "
        "--pipeline-schedule interleaved, or leave one of them out",
    ),
    (
        1,
        f"--num-layers 8 {COUNT} 2",
        f"`{COUNT} 2` needs `{PP}` of at least 2: one rank has none to interleave with",
    ),
    (
        2,
        f"--num-layers 8 {EACH} 2 {FIRST} 2",
        f"`{FIRST} 2` conflicts with `{EACH} 2`: the virtual stages do not all have the same number of layers; legal: {COUNT}",
    ),
    (
        2,
        f"--num-layers 8 --pipeline-stage-layers 2 6 {FIRST} 2 {LOSS}",
        f"`--pipeline-stage-layers 2 6`, `{FIRST} 2` and `{LOSS}` exclude each other: each sets how many layers the stages "
        "have; give one of them",
    ),
    (
        2,
        f"--num-layers 8 {DRAWN} Et*3|t*5|L",
        f"`{DRAWN} Et*3|t*5|L` names 3 stages, not the 2 of 2 pipeline ranks; legal: a multiple of 2 stages, with 8 t in all",
    ),
    (
        2,
        f"--num-layers 8 {DRAWN} E||t*7|L",
        f"`{DRAWN} E||t*7|L` adds up to 7 layers, not to `--num-layers 8` and leaves a stage between the first and the last "
        "without layers; legal: a multiple of 2 stages, with 8 t in all",
    ),
    (
        2,
        f"--num-layers 8 {DRAWN} Et*3|t*5m|L",
        f"`{DRAWN} Et*3|t*5m|L` places a layer of multi-token prediction, m, which is not available",
    ),
]


@pytest.mark.parametrize(("ranks", "change", "message"), CASES)
def test_what_contradicts_itself_is_refused(ranks: int, change: str, message: str) -> None:
    assert problems(f"{PP} {ranks} {change}", ranks) == [message]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("Et*3|(tt|)*29,|L", (3, *[2] * 29, 0, 0)),
        ("E(t|)*2 t*2 L", (1, 1, 2)),
        ("Et(|t*2)*2L", (1, 2, 2)),
        ("EL", (0,)),
        ("E|*3L", (0, 0, 0, 0)),
    ],
)
def test_a_layout_is_written_out(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layout(text) == layers


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "does not begin with E"),
        ("t|tL", "does not begin with E"),
        ("Et|t", "end with L"),
        ("EtEL", "each once"),
        ("Ext*2L", "has x where"),
        ("Et*L", r"has \* where"),
        ("E((t)*2)*2L", "has"),
        ("E(t*999999)*999999L", "longer than 131,072"),
        ("Et*999999L", "longer than 131,072"),
    ],
)
def test_a_wrong_pipeline_layout_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        parse_layout(text)


def test_what_changes_nothing_is_said() -> None:
    def notes(change: str, world: int = 1) -> tuple[str, ...]:
        return parse(argv(change), program="t", world_size=world, check_disk=False).notes

    assert notes(f"{EMBEDDING} {LOSS}") == (f"{EMBEDDING} and {LOSS} change nothing: {PP} is 1",)
    assert notes(f"{COUNT} 1 {PP} 2", 2) == (f"{COUNT} 1 changes nothing: a rank has one stage anyway",)
