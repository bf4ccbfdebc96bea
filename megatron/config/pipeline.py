"""Rules and derived settings of the pipeline, which is part of the layout: layers per stage, stages per rank, and schedule.

By default, the layers are cut into stages of equal work. These flags, most of them Megatron-LM's, cut them differently:

    --pipeline-stage-layers N N ...              layers of each stage, first to last
    --pipeline-model-parallel-layout "Et|tt|tL"  the same as text
    --decoder-{first,last}-pipeline-num-layers   layers of the first and the last rank; the others share the rest evenly
    --account-for-{embedding,loss}-in-pipeline-split   even shares, in which the embedding or the loss counts as a layer

The layers of a rank with several stages are divided evenly among its stages. The requirements of a schedule are in its row of
the table in `pipeline/schedules/schedule.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron.config.batch import all_batch_sizes
from megatron.config.check import ConfigCheck, Rules
from megatron.config.errors import Problem
from megatron.config.layout import LayoutConfig, LayoutSettings
from megatron.config.notation import parse_layout
from megatron.pipeline.schedules.schedule import DEFAULT_SCHEDULE, DEFAULT_WITH_CHUNKS, schedule_kind, schedule_names

PP = "layout.pipeline_model_parallel_size"
VIRTUAL_LAYERS = "layout.num_layers_per_virtual_pipeline_stage"
VIRTUAL_STAGES = "layout.num_virtual_stages_per_pipeline_rank"
SCHEDULE = "layout.pipeline_schedule"
STAGE_LAYERS = "layout.pipeline_stage_layers"
DRAWN_LAYOUT = "layout.pipeline_model_parallel_layout"
END_LAYERS = ("layout.decoder_first_pipeline_num_layers", "layout.decoder_last_pipeline_num_layers")
COUNTED_AS_LAYERS = ("layout.account_for_embedding_in_pipeline_split", "layout.account_for_loss_in_pipeline_split")
SPLIT_SETTINGS = frozenset(
    {PP, VIRTUAL_LAYERS, VIRTUAL_STAGES, SCHEDULE, STAGE_LAYERS, DRAWN_LAYOUT, *END_LAYERS, "model.num_layers"}
)
BATCH_SETTINGS = frozenset({"batch.micro_batch_size", "batch.global_batch_size", "batch.rampup_batch_size"})


def derive_layout(layout: LayoutSettings) -> LayoutSettings:
    """Fill in the schedule, and turn off sequence parallelism if the tensor-parallel size is 1."""
    return replace(
        layout,
        sequence_parallel=layout.sequence_parallel and layout.tensor_model_parallel_size > 1,
        pipeline_schedule=layout.pipeline_schedule
        or (DEFAULT_WITH_CHUNKS if wants_virtual_stages(layout) else DEFAULT_SCHEDULE),
    )


def drawn_stages(layout: LayoutSettings) -> int:
    """Return the number of stages in --pipeline-model-parallel-layout; 0 if it is not given or cannot be parsed."""
    try:
        text = layout.pipeline_model_parallel_layout
        return 0 if text is None else len(parse_layout(text))
    except ValueError:
        return 0


def wants_virtual_stages(layout: LayoutSettings) -> bool:
    """Return whether the flags, apart from the schedule, ask for several stages per rank."""
    if layout.num_layers_per_virtual_pipeline_stage is not None or (layout.num_virtual_stages_per_pipeline_rank or 1) > 1:
        return True
    return drawn_stages(layout) > layout.pipeline_model_parallel_size


def pipeline_chunks(layout: LayoutConfig, layers: int) -> int:
    """Return the number of stages per pipeline rank for a model of `layers` layers, at least 1.

    Some schedules prescribe the number. For the others, it comes from the flags: directly, from a layout, or from the number N
    of layers per virtual stage, as layers / (pp x N), rounded down as in Megatron-LM.
    """
    prescribed = schedule_kind(layout.pipeline_schedule).chunks
    if prescribed is not None:
        return prescribed
    if layout.num_virtual_stages_per_pipeline_rank is not None:
        return layout.num_virtual_stages_per_pipeline_rank
    drawn, layers_per_stage = drawn_stages(layout), layout.num_layers_per_virtual_pipeline_stage
    if layers_per_stage is None:
        return max(1, drawn // layout.pipeline_model_parallel_size)
    counted = layout.account_for_embedding_in_pipeline_split + layout.account_for_loss_in_pipeline_split
    return max(1, (layers + counted) // (layout.pipeline_model_parallel_size * layers_per_stage))


def explicit_stage_layers(layout: LayoutConfig, layers: int) -> tuple[int, ...] | None:
    """Return the number of layers of each stage that the flags ask for; None if the stages are to have equal work.

    Raises:
        ValueError: no division of the layers satisfies the flags. The rules below report this before a run.
    """
    if layout.pipeline_stage_layers:
        return layout.pipeline_stage_layers
    if layout.pipeline_model_parallel_layout is not None:
        return parse_layout(layout.pipeline_model_parallel_layout)
    first, last = layout.decoder_first_pipeline_num_layers, layout.decoder_last_pipeline_num_layers
    embedding, loss = layout.account_for_embedding_in_pipeline_split, layout.account_for_loss_in_pipeline_split
    ranks, chunks = layout.pipeline_model_parallel_size, pipeline_chunks(layout, layers)
    if first is not None or last is not None:
        shares = _fill_between(first, last, layers, ranks)
    elif embedding or loss:
        total = layers + embedding + loss  # embedding and loss count as one layer each
        if total % ranks:
            raise ValueError(
                f"{total} layers, with embedding or loss counted as one, are not divisible by {ranks} pipeline ranks"
            )
        shares = [total // ranks] * ranks
    else:
        return None
    if uneven := [share for share in shares if share % chunks]:
        raise ValueError(f"a rank has {uneven[0]} layers, not divisible by its {chunks} stages")
    # `place` returns the rank of each stage, in the order of the model's layers.
    counts = [shares[rank] // chunks for rank in schedule_kind(layout.pipeline_schedule).place(ranks, chunks)]
    counts[0] -= embedding  # embedding and loss were counted as layers only to divide them evenly
    counts[-1] -= loss
    if min(counts) < 0 or 0 in counts[1:-1]:
        raise ValueError(f"a stage is left without layers: {' '.join(map(str, counts))}")
    return tuple(counts)


def _fill_between(first: int | None, last: int | None, layers: int, ranks: int) -> Sequence[int]:
    """Return the number of layers of each rank if that of the first rank, the last rank or both is given.

    Args:
        first: layers of the first rank, if given.
        last: layers of the last rank, if given.
        layers: layers of the model.
        ranks: number of pipeline ranks.

    Raises:
        ValueError: the remaining layers cannot be divided evenly among the other ranks.
    """
    given = [count for count in (first, last) if count is not None]
    other_ranks, rest = ranks - len(given), layers - sum(given)
    if other_ranks < 0:
        raise ValueError(
            "one pipeline rank is the first and the last; `--pipeline-model-parallel-size` of at least 2 is needed"
        )
    if other_ranks == 0 and rest:
        raise ValueError(f"all pipeline ranks together have {sum(given)} layers, not `--num-layers {layers}`")
    if other_ranks and (rest < other_ranks or rest % other_ranks):
        raise ValueError(
            f"{rest} of `--num-layers {layers}` are left, which the other {other_ranks} pipeline ranks cannot share evenly"
        )
    shares = [rest // other_ranks] * other_ranks if other_ranks else []
    return [*([] if first is None else [first]), *shares, *([] if last is None else [last])]


def virtual_stages(c: ConfigCheck) -> Iterator[Problem]:
    """An interleaved schedule is given the number of virtual stages by one flag, and has at least two ranks; others are not."""
    if c.invalid & {PP, VIRTUAL_LAYERS, VIRTUAL_STAGES, SCHEDULE, DRAWN_LAYOUT}:
        return
    given = [name for name in (VIRTUAL_LAYERS, VIRTUAL_STAGES, DRAWN_LAYOUT) if c[name] is not None]
    prescribed = schedule_kind(c[SCHEDULE]).chunks  # stages per rank; None if the schedule supports any number
    if len(given) > 1:
        yield Problem(c.flag_text(*given), "exclude each other: each sets how many stages a rank has; give one of them")
    elif not given:
        if prescribed is None:
            other = f"or `{c.flag(VIRTUAL_STAGES)}`"
            yield Problem(c.flag_text(SCHEDULE), f"needs `{c.flag(VIRTUAL_LAYERS)}`, the layers of one virtual stage, {other}")
    # A layout as text goes with any schedule; `stage_layers` checks its number of stages.
    elif prescribed is not None and given != [DRAWN_LAYOUT] and c[VIRTUAL_STAGES] != prescribed:
        fixed = "has no virtual stages" if prescribed == 1 else f"always has {prescribed} virtual stages on each rank"
        rule = f"{fixed}, and conflicts with {c.flag_text(*given)}"
        others = schedule_names(lambda kind: kind.chunks is None)
        yield Problem(c.flag_text(SCHEDULE), rule, f"--pipeline-schedule {others}, or leave one of them out")
    elif c[PP] < 2 and prescribed is None and given != [DRAWN_LAYOUT]:
        rule = "needs `--pipeline-model-parallel-size` of at least 2: one rank has none to interleave with"
        yield Problem(c.flag_text(*given), rule)


def one_split(c: ConfigCheck) -> Iterator[Problem]:
    """At most one kind of flag sets the numbers of layers of the stages."""
    if c.invalid & SPLIT_SETTINGS:
        return
    kinds = ((STAGE_LAYERS,), (DRAWN_LAYOUT,), END_LAYERS, COUNTED_AS_LAYERS)
    given_by_kind = [[name for name in kind if c.is_set(name)] for kind in kinds]
    given = [names[0] for names in given_by_kind if names]
    if len(given) > 1:
        yield Problem(c.flag_text(*given), "exclude each other: each sets how many layers the stages have; give one of them")
    elif given_by_kind[kinds.index(END_LAYERS)] and c[VIRTUAL_LAYERS] is not None:
        rule = f"conflicts with {c.flag_text(VIRTUAL_LAYERS)}: the virtual stages do not all have the same number of layers"
        yield Problem(c.flag_text(given[0]), rule, f"{c.flag(VIRTUAL_STAGES)}")


def _chunks(c: ConfigCheck) -> int | None:
    """Return the number of stages per rank; None if the settings that determine it are missing or wrong."""
    layers = c["model.num_layers"]
    if layers is None or c.invalid & SPLIT_SETTINGS or any(virtual_stages(c)) or any(one_split(c)):
        return None
    return pipeline_chunks(c.resolved.layout, layers)


def enough_layers(c: ConfigCheck) -> Iterator[Problem]:
    """There is at least one layer for each stage, unless the user gives the number of layers of each."""
    chunks, layers = _chunks(c), c["model.num_layers"]
    if (
        chunks is None
        or c[STAGE_LAYERS]
        or c[DRAWN_LAYOUT] is not None
        or layers + sum(c[name] for name in COUNTED_AS_LAYERS) >= c[PP] * chunks
    ):
        return
    stages = c[PP] * chunks
    subject = f"{c.flag_text(PP)} makes" if chunks == 1 else f"{c.flag_text(PP, SCHEDULE)} make"
    legal = f"--num-layers {stages} or more"
    if layers >= chunks:
        legal += f", or --pipeline-model-parallel-size {layers // chunks} or less"
    yield Problem(subject, f"{stages} stages, and `--num-layers {layers}` leaves some of them empty", legal)


def stage_layers(c: ConfigCheck) -> Iterator[Problem]:
    """Explicit numbers of layers match the stages and add up to all layers; only the first and the last may be 0."""
    chunks, layers, given, name = _chunks(c), c["model.num_layers"], c[STAGE_LAYERS], STAGE_LAYERS
    if chunks is None or not (given or c[DRAWN_LAYOUT] is not None):
        return
    if not given:
        name = DRAWN_LAYOUT
        try:
            given = parse_layout(c[DRAWN_LAYOUT])
        except ValueError as error:
            yield Problem(c.flag_text(DRAWN_LAYOUT), str(error))
            return
    stages, rules = c[PP] * chunks, []
    if len(given) != stages:
        each = f"{c[PP]} pipeline rank{'s' if c[PP] > 1 else ''}" + (f" x {chunks}" if chunks > 1 else "")
        rules.append(f"names {len(given)} stage{'s' if len(given) > 1 else ''}, not the {stages} of {each}")
    if min(given) < 0:
        rules.append("has a negative number of layers")
    elif sum(given) != layers:
        rules.append(f"adds up to {sum(given)} layers, not to `--num-layers {layers}`")
    if 0 in given[1:-1]:
        rules.append("leaves a stage between the first and the last without layers")
    if rules:
        legal = f"{stages} number{'s' if stages > 1 else ''}, 0 or greater, of sum {layers}"
        if name == DRAWN_LAYOUT:
            legal = f"a multiple of {c[PP]} stages, with {layers} t in all"
        yield Problem(c.flag_text(name), " and ".join(rules), legal)


def shared_layers(c: ConfigCheck) -> Iterator[Problem]:
    """The other ranks can share the layers evenly, with --decoder-{first,last}-... and --account-for-... taken into account."""
    names = [name for name in (*END_LAYERS, *COUNTED_AS_LAYERS) if c.is_set(name)]
    if not names or _chunks(c) is None or any(enough_layers(c)):
        return
    try:
        explicit_stage_layers(c.resolved.layout, c["model.num_layers"])
    except ValueError as error:
        yield Problem(c.flag_text(*names), f"cannot be met: {error}", "also --pipeline-stage-layers, the layers of each stage")


def split_backward(c: ConfigCheck) -> Iterator[Problem]:
    """Layers are not compiled if the schedule splits the backward pass, as zero-bubble schedules do."""
    if c["batch.compile"] and SCHEDULE not in c.invalid and schedule_kind(c[SCHEDULE]).splits:
        rule = "conflicts with `--compile`: it computes weight gradients apart from the layers, which would break their graph"
        yield Problem(c.flag_text(SCHEDULE), rule, f"{schedule_names(lambda kind: not kind.splits)}, or leave out --compile")


def numbers_that_fit(c: ConfigCheck) -> Iterator[Problem]:
    """The schedule supports the numbers of ranks, stages and micro-batches, at every global batch size of the run."""
    chunks, micro, full = _chunks(c), c["batch.micro_batch_size"], c["batch.global_batch_size"]
    if chunks is None or not micro or not full or not c.dp or c.invalid & BATCH_SETTINGS:
        return
    ramp = c["batch.rampup_batch_size"]
    sizes = all_batch_sizes(c.resolved.batch) if not ramp or (len(ramp) == 3 and min(ramp) > 0) else [full]
    for size in (size for size in sizes if size % (micro * c.dp) == 0):  # other rules report sizes that do not divide
        count = size // (micro * c.dp)
        if (objection := schedule_kind(c[SCHEDULE]).objection(c[PP], count, chunks)) is not None:
            batch = f"a global batch of {size} makes {count} micro-batch{'es' if count > 1 else ''}"
            yield Problem(
                c.flag_text(SCHEDULE), f"{objection}; here {batch}, on {c[PP]} pipeline rank{'s' if c[PP] > 1 else ''}"
            )
            return


def remarks(c: ConfigCheck) -> Iterator[str]:
    """Yield remarks on flags of virtual stages and of the split that have no effect with these numbers of layers and ranks."""
    layout, layers = c.resolved.layout, c["model.num_layers"]
    virtual, ranks = layout.num_layers_per_virtual_pipeline_stage, layout.pipeline_model_parallel_size
    if virtual is not None and layers is not None and pipeline_chunks(layout, layers) == 1:
        why = f"{layers} layers on {ranks} pipeline ranks are one stage each"
        yield f"--num-layers-per-virtual-pipeline-stage {virtual} changes nothing: {why}"
    if layout.num_virtual_stages_per_pipeline_rank == 1:
        yield "--num-virtual-stages-per-pipeline-rank 1 changes nothing: a rank has one stage anyway"
    counted = [c.flag(name) for name in COUNTED_AS_LAYERS if c[name]]
    if counted and ranks == 1:
        verb = "changes" if len(counted) == 1 else "change"
        yield f"{' and '.join(counted)} {verb} nothing: --pipeline-model-parallel-size is 1"


RULES = Rules(
    every_run=(virtual_stages, one_split, enough_layers, stage_layers, shared_layers, split_backward, numbers_that_fit),
    remarks=(remarks,),
)
