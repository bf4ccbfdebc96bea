"""The rules of pipeline parallelism: which schedule goes with which stages, and enough layers for them all.

Micro-batches need no rule: a schedule works for any number of them, also for fewer than there are stages.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.case import Case, Rule
from megatron.config.errors import Problem
from megatron.config.options import by_name
from megatron.config.resolve import pipeline_chunks

PP = "layout.pipeline_model_parallel_size"
VIRTUAL = "layout.num_layers_per_virtual_pipeline_stage"
SCHEDULE = "layout.pipeline_schedule"
STAGE_LAYERS = "layout.pipeline_stage_layers"


def virtual_stages(c: Case) -> Iterator[Problem]:
    """Virtual stages and the interleaved schedule go together, on at least two ranks."""
    if c.bad & {PP, VIRTUAL, SCHEDULE}:
        return
    virtual, interleaved = by_name()[VIRTUAL].flag, c[SCHEDULE] == "interleaved"
    if c[VIRTUAL] is None:
        if interleaved:
            yield Problem(c.say(SCHEDULE), f"needs `{virtual}`, the layers of one virtual stage")
    elif not interleaved:
        rule = f"has no virtual stages, and cannot go with `{virtual} {c[VIRTUAL]}`"
        yield Problem(c.say(SCHEDULE), rule, "--pipeline-schedule interleaved, or leave one of them out")
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
    if c["batch.compile"] and str(c[SCHEDULE]).startswith("zb-"):
        rule = "cannot go with `--compile`: it computes weight gradients apart from the layers, which would cut their graph"
        yield Problem(c.say(SCHEDULE), rule, "gpipe, 1f1b or interleaved, or leave out --compile")


PIPELINE_RULES: tuple[Rule, ...] = (virtual_stages, enough_layers, stage_layers, split_backward)
