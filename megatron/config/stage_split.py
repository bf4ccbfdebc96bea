"""How many layers each pipeline stage has, where the flags say it in Megatron-LM's ways. Pure.

    --pipeline-stage-layers N N ...              of each stage, first to last
    --pipeline-model-parallel-layout "Et|tt|tL"  the same, drawn
    --decoder-{first,last}-pipeline-num-layers   of the first and the last rank; the others share the rest evenly
    --account-for-{embedding,loss}-in-pipeline-split   even shares in which that end of the model counts as a layer

Without any of them `stages.py` cuts by work. A rank with several stages shares its layers evenly among them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron.config.schema import LayoutConfig
from megatron.pipeline.schedules.schedule import kind_of

MAX_SIGNS = 1 << 17  # of a layout written out: a stage and a layer for each of 65,536
GROUP = re.compile(r"\(([^()]*)\)\*(\d{1,6})", re.ASCII)
REPEATED = re.compile(r"([^*()\d])\*(\d{1,6})", re.ASCII)


def parse_layout(text: str) -> tuple[int, ...]:
    """The layers of each stage of a --pipeline-model-parallel-layout.

    Stages stand between `|`; E is the embedding, t a layer, L the loss. `x*3` is `xxx` and `(tt|)*2` is `tt|tt|`; commas and
    blanks mean nothing. ValueError saying what is wrong.
    """
    plain = re.sub(r"[, ]", "", text)
    for pattern in (GROUP, REPEATED):
        if sum(len(found[1]) * int(found[2]) for found in pattern.finditer(plain)) > MAX_SIGNS:
            raise ValueError(f"is longer than {MAX_SIGNS:,} stages and layers")
        plain = pattern.sub(lambda found: found[1] * int(found[2]), plain)
    if "m" in plain:
        raise ValueError("places a layer of multi-token prediction, m, which is not available")
    if strange := sorted(set(plain) - set("EtL|")):
        raise ValueError(f"has {' '.join(strange)} where E, t, L, |, x*N or (xy)*N is expected")
    if not plain.startswith("E") or not plain.endswith("L") or plain.count("E") + plain.count("L") != 2:
        raise ValueError("does not begin with E, the embedding, and end with L, the loss, each once")
    return tuple(stage.count("t") for stage in plain.split("|"))


def layout_stages(layout: LayoutConfig) -> int:
    """Stages that --pipeline-model-parallel-layout draws; 0 where it is not given, or is none."""
    try:
        text = layout.pipeline_model_parallel_layout
        return 0 if text is None else len(parse_layout(text))
    except ValueError:
        return 0


def wants_virtual_stages(layout: LayoutConfig) -> bool:
    """Whether the ranks are to have several stages each, whatever the schedule."""
    if layout.num_layers_per_virtual_pipeline_stage is not None or (layout.num_virtual_stages_per_pipeline_rank or 1) > 1:
        return True
    return layout_stages(layout) > layout.pipeline_model_parallel_size


def pipeline_chunks(layout: LayoutConfig, layers: int) -> int:
    """Stages of each pipeline rank, for `layers` layers and a layout whose schedule is resolved.

    What the schedule prescribes; where it is free, what the flags say: a number, a drawn layout, or Megatron-LM's num_layers
    / pp / N virtual stages, rounded down where that leaves a rest, and never none.
    """
    prescribed = kind_of(layout.pipeline_schedule).chunks
    if prescribed is not None:
        return prescribed
    if layout.num_virtual_stages_per_pipeline_rank is not None:
        return layout.num_virtual_stages_per_pipeline_rank
    drawn, wanted = layout_stages(layout), layout.num_layers_per_virtual_pipeline_stage
    if wanted is None:
        return max(1, drawn // layout.pipeline_model_parallel_size)
    counted = layout.account_for_embedding_in_pipeline_split + layout.account_for_loss_in_pipeline_split
    return max(1, (layers + counted) // (layout.pipeline_model_parallel_size * wanted))


def asked_stage_layers(layout: LayoutConfig, layers: int) -> tuple[int, ...] | None:
    """The layers of each stage as the flags say; None where they leave it open, and the stages are cut by work.

    ValueError saying what is wrong: which the rules find out before a run.
    """
    if layout.pipeline_stage_layers:
        return layout.pipeline_stage_layers
    if layout.pipeline_model_parallel_layout is not None:
        return parse_layout(layout.pipeline_model_parallel_layout)
    first, last = layout.decoder_first_pipeline_num_layers, layout.decoder_last_pipeline_num_layers
    embedding, loss = layout.account_for_embedding_in_pipeline_split, layout.account_for_loss_in_pipeline_split
    ranks, chunks = layout.pipeline_model_parallel_size, pipeline_chunks(layout, layers)
    if first is not None or last is not None:
        shares = _around(first, last, layers, ranks)
    elif embedding or loss:
        total = layers + embedding + loss
        if total % ranks:
            raise ValueError(
                f"{total} layers, those included that the ends count as, are not divisible by {ranks} pipeline ranks"
            )
        shares = [total // ranks] * ranks
    else:
        return None
    if uneven := [share for share in shares if share % chunks]:
        raise ValueError(f"a rank has {uneven[0]} layers, not divisible by its {chunks} stages")
    counts = [shares[rank] // chunks for rank in kind_of(layout.pipeline_schedule).place(ranks, chunks)]
    counts[0] -= embedding
    counts[-1] -= loss
    if min(counts) < 0 or 0 in counts[1:-1]:
        raise ValueError(f"a stage is left without layers: {' '.join(map(str, counts))}")
    return tuple(counts)


def _around(first: int | None, last: int | None, layers: int, ranks: int) -> Sequence[int]:
    """The layers of each rank where those of the first or the last are given."""
    given = [count for count in (first, last) if count is not None]
    between, rest = ranks - len(given), layers - sum(given)
    if between < 0:
        raise ValueError(
            "one pipeline rank is the first and the last; `--pipeline-model-parallel-size` of at least 2 is needed"
        )
    if between == 0 and rest:
        raise ValueError(f"all pipeline ranks together have {sum(given)} layers, not `--num-layers {layers}`")
    if between and (rest < between or rest % between):
        raise ValueError(
            f"{rest} of `--num-layers {layers}` are left, which the other {between} pipeline ranks cannot share evenly"
        )
    shares = [rest // between] * between if between else []
    return [*([] if first is None else [first]), *shares, *([] if last is None else [last])]
