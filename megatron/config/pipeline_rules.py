"""The rules of pipeline parallelism: which schedule goes with which stages, and enough layers for them all.

What a schedule needs is said in its row in `pipeline/schedule.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.batch_size import ramp_sizes
from megatron.config.case import Case, Rule
from megatron.config.errors import Problem
from megatron.config.options import by_name
from megatron.config.resolve import pipeline_chunks
from megatron.pipeline.schedule import kind_of, names_of

PP = "layout.pipeline_model_parallel_size"
VIRTUAL = "layout.num_layers_per_virtual_pipeline_stage"
SCHEDULE = "layout.pipeline_schedule"
STAGE_LAYERS = "layout.pipeline_stage_layers"
BATCH = frozenset({"batch.micro_batch_size", "batch.global_batch_size", "batch.rampup_batch_size"})


def virtual_stages(c: Case) -> Iterator[Problem]:
    """Virtual stages and a schedule that leaves their number to the user go together, on at least two ranks."""
    if c.bad & {PP, VIRTUAL, SCHEDULE}:
        return
    virtual, free = by_name()[VIRTUAL].flag, kind_of(c[SCHEDULE]).chunks is None
    if c[VIRTUAL] is None:
        if free:
            yield Problem(c.say(SCHEDULE), f"needs `{virtual}`, the layers of one virtual stage")
    elif not free:
        own = kind_of(c[SCHEDULE]).chunks
        has = "no virtual stages" if own == 1 else f"{own} virtual stages of its own on each rank"
        rule = f"has {has}, and cannot go with `{virtual} {c[VIRTUAL]}`"
        others = names_of(lambda kind: kind.chunks is None)
        yield Problem(c.say(SCHEDULE), rule, f"--pipeline-schedule {others}, or leave one of them out")
    elif c[PP] < 2:
        rule = "needs `--pipeline-model-parallel-size` of at least 2: one rank has nobody to interleave with"
        yield Problem(c.say(VIRTUAL), rule)


def _chunks(c: Case) -> int | None:
    """Stages of each rank; None where another rule has something to say of what they follow from."""
    layers = c["model.num_layers"]
    if layers is None or c.bad & {PP, VIRTUAL, SCHEDULE, STAGE_LAYERS, "model.num_layers"} or any(virtual_stages(c)):
        return None
    return pipeline_chunks(c.resolved.layout, layers)


def enough_layers(c: Case) -> Iterator[Problem]:
    """Each stage has at least one layer, unless the user says how many each has."""
    chunks, layers = _chunks(c), c["model.num_layers"]
    if chunks is None or c[STAGE_LAYERS] or layers >= c[PP] * chunks:
        return
    stages = c[PP] * chunks
    makes = f"{c.say(PP)} makes" if chunks == 1 else f"{c.say(PP, SCHEDULE)} make"
    legal = f"--num-layers {stages} or more"
    if layers >= chunks:
        legal += f", or --pipeline-model-parallel-size {layers // chunks} or less"
    yield Problem(makes, f"{stages} stages, and `--num-layers {layers}` leaves some of them empty", legal)


def stage_layers(c: Case) -> Iterator[Problem]:
    """An explicit cut names every stage and every layer; only a stage with an end of the model can do without layers."""
    chunks, layers, given = _chunks(c), c["model.num_layers"], c[STAGE_LAYERS]
    if chunks is None or not given:
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
        yield Problem(c.say(STAGE_LAYERS), " and ".join(rules), legal)


def split_backward(c: Case) -> Iterator[Problem]:
    """Zero-bubble schedules take the weights' gradients out of the layers' backward pass."""
    if c["batch.compile"] and SCHEDULE not in c.bad and kind_of(c[SCHEDULE]).splits:
        rule = "cannot go with `--compile`: it computes weight gradients apart from the layers, which would cut their graph"
        yield Problem(c.say(SCHEDULE), rule, f"{names_of(lambda kind: not kind.splits)}, or leave out --compile")


def numbers_that_fit(c: Case) -> Iterator[Problem]:
    """Ranks, chunks and micro-batches are such that the schedule can have them, also while the batch size grows."""
    chunks, micro, full = _chunks(c), c["batch.micro_batch_size"], c["batch.global_batch_size"]
    if chunks is None or not micro or not full or not c.dp or c.bad & BATCH:
        return
    ramp, stepped = c["batch.rampup_batch_size"], c["batch.batch_size_steps"]
    sizes = ramp_sizes(c.resolved.batch) if stepped or (len(ramp) == 3 and min(ramp) > 0) else [full]
    for size in (size for size in sizes if size % (micro * c.dp) == 0):  # other rules speak of the rest
        count = size // (micro * c.dp)
        if (objection := kind_of(c[SCHEDULE]).objection(c[PP], count, chunks)) is not None:
            batch = f"a global batch of {size} makes {count} micro-batch{'es' if count > 1 else ''}"
            yield Problem(c.say(SCHEDULE), f"{objection}; here {batch}, on {c[PP]} pipeline rank{'s' if c[PP] > 1 else ''}")
            return


PIPELINE_RULES: tuple[Rule, ...] = (virtual_stages, enough_layers, stage_layers, split_backward, numbers_that_fit)
