"""The rules of pipeline parallelism: which schedule goes with which stages, and enough layers for them all.

What a schedule needs is said in its row in `pipeline/schedules/schedule.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.batch_size import ramp_sizes
from megatron.config.case import Case, Rule
from megatron.config.errors import Problem
from megatron.config.options import by_name
from megatron.config.schema import LayoutConfig
from megatron.config.stage_split import asked_stage_layers, parse_layout, pipeline_chunks
from megatron.pipeline.schedules.schedule import kind_of, names_of

PP = "layout.pipeline_model_parallel_size"
VIRTUAL = "layout.num_layers_per_virtual_pipeline_stage"
COUNT = "layout.num_virtual_stages_per_pipeline_rank"
SCHEDULE = "layout.pipeline_schedule"
STAGE_LAYERS = "layout.pipeline_stage_layers"
DRAWN = "layout.pipeline_model_parallel_layout"
ENDS = ("layout.decoder_first_pipeline_num_layers", "layout.decoder_last_pipeline_num_layers")
COUNTED = ("layout.account_for_embedding_in_pipeline_split", "layout.account_for_loss_in_pipeline_split")
SPLIT = frozenset({PP, VIRTUAL, COUNT, SCHEDULE, STAGE_LAYERS, DRAWN, *ENDS, "model.num_layers"})
BATCH = frozenset({"batch.micro_batch_size", "batch.global_batch_size", "batch.rampup_batch_size"})


def virtual_stages(c: Case) -> Iterator[Problem]:
    """Virtual stages and a schedule that leaves their number to the user go together, on at least two ranks."""
    if c.bad & {PP, VIRTUAL, COUNT, SCHEDULE, DRAWN}:
        return
    asked = [name for name in (VIRTUAL, COUNT, DRAWN) if c[name] is not None]
    own = kind_of(c[SCHEDULE]).chunks
    if len(asked) > 1:
        yield Problem(c.flag_text(*asked), "exclude each other: each says how many stages a rank has; give one of them")
    elif not asked:
        if own is None:
            other = f"or `{by_name()[COUNT].flag}`"
            yield Problem(c.flag_text(SCHEDULE), f"needs `{by_name()[VIRTUAL].flag}`, the layers of one virtual stage, {other}")
    elif own is not None and asked != [DRAWN] and c[COUNT] != own:
        has = "no virtual stages" if own == 1 else f"{own} virtual stages of its own on each rank"
        rule = f"has {has}, and cannot go with {c.flag_text(*asked)}"
        others = names_of(lambda kind: kind.chunks is None)
        yield Problem(c.flag_text(SCHEDULE), rule, f"--pipeline-schedule {others}, or leave one of them out")
    elif c[PP] < 2 and own is None and asked != [DRAWN]:
        rule = "needs `--pipeline-model-parallel-size` of at least 2: one rank has nobody to interleave with"
        yield Problem(c.flag_text(*asked), rule)


def one_split(c: Case) -> Iterator[Problem]:
    """The layers are given to the stages in one way."""
    if c.bad & SPLIT:
        return
    ways = [[name for name in way if c.given(name)] for way in ((STAGE_LAYERS,), (DRAWN,), ENDS, COUNTED)]
    given = [names[0] for names in ways if names]
    if len(given) > 1:
        yield Problem(c.flag_text(*given), "exclude each other: each says how many layers the stages have; give one of them")
    elif ways[2] and c[VIRTUAL] is not None:
        rule = f"does not go with {c.flag_text(VIRTUAL)}: stages of several sizes have no number of layers in common"
        yield Problem(c.flag_text(given[0]), rule, f"{by_name()[COUNT].flag}")


def _chunks(c: Case) -> int | None:
    """Stages of each rank; None where another rule has something to say of what they follow from."""
    layers = c["model.num_layers"]
    if layers is None or c.bad & SPLIT or any(virtual_stages(c)) or any(one_split(c)):
        return None
    return pipeline_chunks(c.resolved.layout, layers)


def enough_layers(c: Case) -> Iterator[Problem]:
    """Each stage has at least one layer or an end that counts as one, unless the user says how many each has."""
    chunks, layers = _chunks(c), c["model.num_layers"]
    if chunks is None or c[STAGE_LAYERS] or c[DRAWN] is not None or layers + sum(c[name] for name in COUNTED) >= c[PP] * chunks:
        return
    stages = c[PP] * chunks
    makes = f"{c.flag_text(PP)} makes" if chunks == 1 else f"{c.flag_text(PP, SCHEDULE)} make"
    legal = f"--num-layers {stages} or more"
    if layers >= chunks:
        legal += f", or --pipeline-model-parallel-size {layers // chunks} or less"
    yield Problem(makes, f"{stages} stages, and `--num-layers {layers}` leaves some of them empty", legal)


def stage_layers(c: Case) -> Iterator[Problem]:
    """An explicit cut names every stage and every layer; only a stage with an end of the model can do without layers."""
    chunks, layers, given, name = _chunks(c), c["model.num_layers"], c[STAGE_LAYERS], STAGE_LAYERS
    if chunks is None or not (given or c[DRAWN] is not None):
        return
    if not given:
        name = DRAWN
        try:
            given = parse_layout(c[DRAWN])
        except ValueError as error:
            yield Problem(c.flag_text(DRAWN), str(error))
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
        rules.append("leaves a stage between the first and the last without layers, so with nothing to do")
    if rules:
        legal = f"{stages} number{'s' if stages > 1 else ''}, 0 or greater, of sum {layers}"
        if name == DRAWN:
            legal = f"stages in a multiple of {c[PP]}, with {layers} t in all"
        yield Problem(c.flag_text(name), " and ".join(rules), legal)


def shared_layers(c: Case) -> Iterator[Problem]:
    """What the first and the last rank leave, or what the ends of the model make of it, can be shared evenly."""
    names = [name for name in (*ENDS, *COUNTED) if c.given(name)]
    if not names or _chunks(c) is None or any(enough_layers(c)):
        return
    try:
        asked_stage_layers(c.resolved.layout, c["model.num_layers"])
    except ValueError as error:
        yield Problem(c.flag_text(*names), f"cannot be had: {error}", "also --pipeline-stage-layers, the layers of each stage")


def split_backward(c: Case) -> Iterator[Problem]:
    """Zero-bubble schedules take the weights' gradients out of the layers' backward pass."""
    if c["batch.compile"] and SCHEDULE not in c.bad and kind_of(c[SCHEDULE]).splits:
        rule = "cannot go with `--compile`: it computes weight gradients apart from the layers, which would cut their graph"
        yield Problem(c.flag_text(SCHEDULE), rule, f"{names_of(lambda kind: not kind.splits)}, or leave out --compile")


def numbers_that_fit(c: Case) -> Iterator[Problem]:
    """Ranks, chunks and micro-batches are such that the schedule can have them, also while the batch size grows."""
    chunks, micro, full = _chunks(c), c["batch.micro_batch_size"], c["batch.global_batch_size"]
    if chunks is None or not micro or not full or not c.dp or c.bad & BATCH:
        return
    ramp = c["batch.rampup_batch_size"]
    sizes = ramp_sizes(c.resolved.batch) if not ramp or (len(ramp) == 3 and min(ramp) > 0) else [full]
    for size in (size for size in sizes if size % (micro * c.dp) == 0):  # other rules speak of the rest
        count = size // (micro * c.dp)
        if (objection := kind_of(c[SCHEDULE]).objection(c[PP], count, chunks)) is not None:
            batch = f"a global batch of {size} makes {count} micro-batch{'es' if count > 1 else ''}"
            yield Problem(
                c.flag_text(SCHEDULE), f"{objection}; here {batch}, on {c[PP]} pipeline rank{'s' if c[PP] > 1 else ''}"
            )
            return


PIPELINE_RULES: tuple[Rule, ...] = (
    virtual_stages, one_split, enough_layers, stage_layers, shared_layers, split_backward, numbers_that_fit,
)  # fmt: skip


def split_remarks(layout: LayoutConfig) -> list[str]:
    """What was said of the pipeline's stages and has no effect."""
    notes = []
    if layout.num_virtual_stages_per_pipeline_rank == 1:
        notes.append("--num-virtual-stages-per-pipeline-rank 1 changes nothing: a rank has one stage anyway")
    counted = [by_name()[name].flag for name in COUNTED if getattr(layout, name.split(".")[1])]
    if counted and layout.pipeline_model_parallel_size == 1:
        verb = "changes" if len(counted) == 1 else "change"
        notes.append(f"{' and '.join(counted)} {verb} nothing: --pipeline-model-parallel-size is 1")
    return notes
