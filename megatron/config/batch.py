"""Settings of batch sizes and of the length of a run, and the arithmetic of batch sizes that change during a run.

With `--rampup-batch-size START INCREMENT SAMPLES`, the global batch begins with START samples and grows by INCREMENT at equal
intervals over SAMPLES samples, until it reaches `--global-batch-size`. With `--step-batch-size-schedule "0:SIZE TOKENS:SIZE
..."`, each SIZE applies once the run has trained on the given number of TOKENS. The global batch size is a function of the
number of consumed samples, so a resumed run needs no other state. The formulas are those of Megatron-LM's
num_microbatches_calculator.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path

from megatron.config.check import ConfigCheck, Rules, missing
from megatron.config.errors import Problem
from megatron.config.notation import BatchSizeSteps, parse_iteration_ranges, parse_steps
from megatron.config.option import NOT_NEGATIVE, POSITIVE, SAMPLES, option

STEP_SCHEDULE = "batch.step_batch_size_schedule"


@dataclass(frozen=True)
class BatchSettings:
    """Batch sizes, and the length of training."""

    micro_batch_size: int | None = option(None, "samples per data-parallel rank and forward pass", legal=POSITIVE)
    global_batch_size: int | None = option(
        None, "samples per iteration over all ranks (default: micro-batch-size x data-parallel size)", legal=SAMPLES
    )
    rampup_batch_size: tuple[int, ...] = option(
        (), "START INCREMENT SAMPLES: grow the global batch by INCREMENT from START over SAMPLES samples"
    )
    decrease_batch_size_if_needed: bool = option(
        False, "round the global batch size down to a multiple of micro-batch-size x data-parallel size"
    )
    batch_multiple: int = option(1, "multiple to which --decrease-batch-size-if-needed rounds down, in samples", flag=None)
    step_batch_size_schedule: tuple[str, ...] = option(
        (),
        "0:SIZE TOKENS:SIZE ...: global batch size from each number of trained tokens on; the last one is "
        "--global-batch-size, which may be left out; numbers may end in K, M, B or T",
        metavar="TOKENS:SIZE",
    )
    batch_size_steps: tuple[int, ...] = option(
        (), "consumed samples and global batch size of each entry of --step-batch-size-schedule, alternating", flag=None
    )
    train_iters: int | None = option(None, "iterations to train", legal=POSITIVE)
    train_samples: int | None = option(None, "samples to train, instead of --train-iters", legal=POSITIVE)
    skip_train_iterations: tuple[str, ...] = option(
        (),
        "iterations N, and ranges A-B, whose samples are consumed without an update",
        aliases=("--iterations-to-skip",),
    )
    exit_interval: int | None = option(None, "save and exit at the next iteration that is a multiple of this", legal=POSITIVE)
    exit_duration_in_mins: float | None = option(
        None, "save and exit before the run has taken this many minutes", legal=POSITIVE
    )
    stop_file: str | None = option(None, "save and exit when this file appears, and remove it (default: `stop` in --save)")
    seed: int = option(1234, "random seed of initial weights, sample order and dropout masks", legal=NOT_NEGATIVE)
    loss_average: str = option(
        "token",
        "average of the loss; token: over all tokens of the global batch that count; micro-batch: Megatron-LM's mean of the "
        "micro-batches' means",
        choices=("token", "micro-batch"),
        shortcuts={"--calculate-per-token-loss": "token"},
    )
    compile: bool = option(False, "compile the transformer layers with torch.compile; worthwhile at tensor-parallel size 1")

    @property
    def iterations(self) -> int:
        """Number of iterations to train; 0 for a run that does not train, and until a task has read its data."""
        return self.train_iters or 0


@dataclass(frozen=True, kw_only=True)
class BatchConfig(BatchSettings):
    """Resolved batch sizes, and the length of training."""

    micro_batch_size: int = field()
    global_batch_size: int = field()


def global_batch_size_at(batch: BatchSettings, consumed_samples: int) -> int:
    """Return the size of the global batch that follows `consumed_samples`. ValueError if it is not resolved yet."""
    return _round_down(batch, _scheduled_size(batch, consumed_samples))


def final_batch_size(batch: BatchSettings) -> int:
    """Return the global batch size after its last change. Evaluations use it too."""
    return _round_down(batch, _target_size(batch))


def _scheduled_size(batch: BatchSettings, consumed_samples: int) -> int:
    """Return the size of the global batch that follows `consumed_samples`, before it is rounded down to a multiple."""
    target = _target_size(batch)
    if batch.batch_size_steps:
        return next(size for begin, size in reversed(_schedule_steps(batch)) if consumed_samples >= begin)
    if not batch.rampup_batch_size:
        return target
    start, increment, samples = batch.rampup_batch_size
    increments = (target - start) // increment  # at equal intervals of samples / increments
    if increments == 0 or consumed_samples > samples:
        return target
    return min(target, start + int(consumed_samples / (samples / increments)) * increment) if samples else target


def all_batch_sizes(batch: BatchSettings) -> list[int]:
    """Return every global batch size of the run, in order."""
    target = _target_size(batch)
    if batch.batch_size_steps:
        return [size for _, size in _schedule_steps(batch)]
    if not batch.rampup_batch_size:
        return [_round_down(batch, target)]
    start, increment, _ = batch.rampup_batch_size
    return [_round_down(batch, size) for size in range(start, target + 1, increment)]


def batch_size_phases(batch: BatchSettings, consumed: int = 0) -> Iterator[tuple[int | None, int]]:
    """Yield the number of iterations and the global batch size of each phase of the run that follows `consumed` samples.

    In a phase, all iterations have the same global batch size. Each iteration of a ramp-up is yielded as a phase. The number of
    iterations of the last phase is None, because it has no end.
    """
    if batch.batch_size_steps:
        for (_, size), (end, _) in pairwise(_schedule_steps(batch)):
            if consumed < end:
                iterations = -(-(end - consumed) // size)  # rounded up: the iteration that crosses `end` has the old size
                consumed += iterations * size
                yield iterations, size
    elif batch.rampup_batch_size:
        while consumed <= batch.rampup_batch_size[2]:
            size = global_batch_size_at(batch, consumed)
            consumed += size
            yield 1, size
    yield None, final_batch_size(batch)


def iterations_for(batch: BatchSettings, samples: int) -> int:
    """Return the number of whole iterations in the first `samples` samples.

    Batch sizes are not rounded down for this, so that the length of a run does not depend on the number of ranks.
    """
    iterations = 0
    for phase_iterations, size in batch_size_phases(replace(batch, batch_multiple=1)):
        whole = samples // size
        if phase_iterations is None or whole < phase_iterations:
            return iterations + whole
        iterations, samples = iterations + phase_iterations, samples - phase_iterations * size
    return iterations


def samples_for(batch: BatchSettings, iterations: int) -> int:
    """Return the number of samples in the first `iterations` iterations. As in `iterations_for`, sizes are not rounded down."""
    samples = 0
    for phase_iterations, size in batch_size_phases(replace(batch, batch_multiple=1)):
        taken = iterations if phase_iterations is None else min(phase_iterations, iterations)
        iterations, samples = iterations - taken, samples + taken * size
        if not iterations:
            break
    return samples


def _schedule_steps(batch: BatchSettings) -> BatchSizeSteps:
    """Return `batch_size_steps` as pairs. The field itself is flat, because saved configurations do not nest lists."""
    numbers = batch.batch_size_steps
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _round_down(batch: BatchSettings, size: int) -> int:
    """Round a global batch size down to a multiple of `batch_multiple`, which is 1 without --decrease-batch-size-if-needed."""
    return size - size % batch.batch_multiple


def _target_size(batch: BatchSettings) -> int:
    """Return --global-batch-size, which is the last size of a ramp-up or a schedule. ValueError if it is not resolved yet."""
    if batch.global_batch_size is None:
        raise ValueError("the global batch size is not resolved yet")
    return batch.global_batch_size


def derive_batch(batch: BatchSettings, dp: int | None, seq_length: int | None) -> BatchSettings:
    """Fill in the global batch size and the length of the run, as Megatron-LM does.

    Args:
        batch: the settings.
        dp: number of data-parallel ranks; None when the layout does not fit the world size.
        seq_length: tokens per sample; None when it is missing.
    """
    batch = replace(batch, batch_size_steps=_parse_schedule(batch, seq_length))
    if batch.batch_size_steps:
        batch = replace(batch, global_batch_size=batch.batch_size_steps[-1])
    if batch.global_batch_size is None and batch.micro_batch_size is not None and dp is not None:
        batch = replace(batch, global_batch_size=batch.micro_batch_size * dp)
    # The multiple is stored, so that the batch size at any point can be computed without the number of ranks.
    multiple = (batch.micro_batch_size or 1) * (dp or 1) if batch.decrease_batch_size_if_needed else 1
    batch = replace(batch, batch_multiple=max(1, multiple))
    size, ramp = batch.global_batch_size, batch.rampup_batch_size
    # The iterations of an illegal ramp-up, which a rule will report, must not be counted: the loop may never end.
    is_legal = size is not None and size > 0 and (not ramp or (len(ramp) == 3 and min(ramp) > 0 and ramp[0] <= size))
    if batch.train_iters is None and batch.train_samples is not None and is_legal:
        batch = replace(batch, train_iters=iterations_for(batch, batch.train_samples))
    return batch


def _parse_schedule(batch: BatchSettings, seq_length: int | None) -> tuple[int, ...]:
    """Return `batch_size_steps` for --step-batch-size-schedule; empty if it is not given, or other settings are wrong."""
    if not batch.step_batch_size_schedule or batch.rampup_batch_size or not seq_length or seq_length < 1:
        return ()
    try:
        return tuple(chain(*parse_steps(batch.step_batch_size_schedule, seq_length)))
    except ValueError:  # reported by `step_sizes`
        return ()


def micro_batch_given(c: ConfigCheck) -> Iterator[Problem]:
    """The micro-batch size is given."""
    yield from missing(c, ["batch.micro_batch_size"])


def run_length_given(c: ConfigCheck) -> Iterator[Problem]:
    """A pretraining run that trains is given its length, by --train-iters or --train-samples."""
    no_samples = c["batch.train_samples"] is None and "batch.train_samples" not in c.invalid
    if not c["eval.skip_train"] and no_samples and not c.is_set("task.epochs"):  # `no_task` reports epochs
        yield from missing(c, ["batch.train_iters"], " (or `--train-samples`)")


def global_batch(c: ConfigCheck) -> Iterator[Problem]:
    """The global batch divides into whole micro-batches over the data-parallel ranks."""
    micro, size = c["batch.micro_batch_size"], c["batch.global_batch_size"]
    decreased = c["batch.decrease_batch_size_if_needed"] and size and size >= c["batch.batch_multiple"]
    if decreased or c["batch.step_batch_size_schedule"]:  # `step_sizes` checks the sizes of a schedule
        return
    if micro and size and c.dp and size % (micro * c.dp):
        rule = f"is not divisible by `--micro-batch-size {micro}` x {c.dp} data-parallel ranks = {micro * c.dp}"
        yield Problem(c.flag_text("batch.global_batch_size"), rule, f"multiples of {micro * c.dp}")


def ramp_up(c: ConfigCheck) -> Iterator[Problem]:
    """A ramp-up reaches the global batch size in whole increments, through sizes of whole micro-batches."""
    ramp, size, micro = c["batch.rampup_batch_size"], c["batch.global_batch_size"], c["batch.micro_batch_size"]
    if not ramp or "batch.rampup_batch_size" in c.invalid:
        return
    what = c.flag_text("batch.rampup_batch_size")
    if len(ramp) != 3 or min(ramp) <= 0:
        yield Problem(what, "must be three numbers above 0: START INCREMENT SAMPLES")
        return
    if c.iterations_chosen:
        yield Problem(
            f"{what} and {c.flag_text('batch.train_iters')}", "exclude each other; use --train-samples with a ramp-up"
        )
    if size is None or "batch.global_batch_size" in c.invalid:
        return
    if not c.is_set("batch.global_batch_size"):
        # The default, one micro-batch per rank, makes no sense as the end of a ramp-up.
        yield Problem(what, "needs `--global-batch-size`, the size at its end")
    elif ramp[0] > size or (size - ramp[0]) % ramp[1]:
        yield Problem(what, f"does not reach `--global-batch-size {size}` from {ramp[0]} in steps of {ramp[1]}")
    elif ramp[0] < c["batch.batch_multiple"]:
        rule = f"begins with less than `--micro-batch-size {micro}` x {c.dp} data-parallel ranks = {c['batch.batch_multiple']}"
        yield Problem(what, rule)
    elif micro and c.dp and (uneven := [s for s in all_batch_sizes(c.resolved.batch) if s % (micro * c.dp) and s != size]):
        sizes = ", ".join(map(str, uneven[:4])) + (", ..." if len(uneven) > 4 else "")
        rule = f"passes through {sizes}, not divisible by `--micro-batch-size {micro}` x {c.dp} data-parallel ranks"
        yield Problem(what, rule, f"START and INCREMENT multiples of {micro * c.dp}")


def some_training(c: ConfigCheck) -> Iterator[Problem]:
    """--train-samples is at least one global batch."""
    samples, size, ramp = c["batch.train_samples"], c["batch.global_batch_size"], c["batch.rampup_batch_size"]
    if not samples or not size or (ramp and (len(ramp) != 3 or min(ramp) <= 0)):
        return
    if samples < (first := global_batch_size_at(c.resolved.batch, 0)):
        yield Problem(c.flag_text("batch.train_samples"), f"is less than one global batch of {first} samples")


def step_sizes(c: ConfigCheck) -> Iterator[Problem]:
    """A schedule of batch sizes excludes other settings of batch sizes, and its sizes divide into whole micro-batches.

    If the run may resume, `rules.divisible_remaining_sizes` checks the sizes instead, once the consumed samples are known.
    """
    seq_length, micro = c["data.seq_length"], c["batch.micro_batch_size"]
    if not c[STEP_SCHEDULE] or STEP_SCHEDULE in c.invalid:
        return
    what = c.flag_text(STEP_SCHEDULE)
    for other in ("batch.rampup_batch_size", "batch.decrease_batch_size_if_needed"):
        if c[other]:
            yield Problem(c.flag_text(STEP_SCHEDULE, other), "exclude each other; give one of them")
            return
    if seq_length is None:  # reported by `sample_length_given`
        return
    try:
        sizes = [size for _, size in parse_steps(c[STEP_SCHEDULE], seq_length)]
    except ValueError as error:
        yield Problem(what, str(error))
        return
    size = c.raw.batch.global_batch_size
    if size is not None and size != sizes[-1]:
        rule = "exclude each other: the schedule sets every size, and its last one is the global batch size"
        yield Problem(f"{what} and `--global-batch-size {size}`", rule)
    elif micro and c.dp and c["checkpoint.load"] is None and not c["checkpoint.auto_resume"]:
        yield from divisible_batch_sizes(what, sizes, micro, c.dp)


def divisible_batch_sizes(what: str, sizes: list[int], micro: int, dp: int) -> Iterator[Problem]:
    """Yield a problem if some global batch sizes do not divide into whole micro-batches over the data-parallel ranks.

    Args:
        what: the setting that gives the sizes, for the message.
        sizes: global batch sizes, in samples.
        micro: micro-batch size, in samples.
        dp: number of data-parallel ranks.
    """
    if uneven := [size for size in sizes if size % (micro * dp)]:
        shown = ", ".join(map(str, uneven[:4])) + (", ..." if len(uneven) > 4 else "")
        rule = f"has the sizes {shown}, not divisible by `--micro-batch-size {micro}` x {dp} data-parallel ranks"
        yield Problem(what, rule, f"multiples of {micro * dp}")


def skipped_iterations(c: ConfigCheck) -> Iterator[Problem]:
    """The iterations to skip are numbers and ranges of numbers."""
    try:
        parse_iteration_ranges(c["batch.skip_train_iterations"])
    except ValueError as error:
        yield Problem(
            c.flag_text("batch.skip_train_iterations"), str(error), "numbers and ranges such as 120 300-310, from 1 on"
        )


def stop_file(c: ConfigCheck) -> Iterator[Problem]:
    """The stop file does not exist as a directory, and files in its directory can be created and removed."""
    if (name := c["batch.stop_file"]) is None:
        return
    path = Path(name).absolute()
    if os.path.isdir(path):
        yield Problem(c.flag_text("batch.stop_file"), "is a directory, not a file")
    elif not os.path.isdir(path.parent):
        yield Problem(c.flag_text("batch.stop_file"), f"can never appear: there is no directory {path.parent}")
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        yield Problem(c.flag_text("batch.stop_file"), f"cannot be removed: permission denied in {path.parent}")


def remarks(c: ConfigCheck) -> Iterator[str]:
    """Yield a remark if --decrease-batch-size-if-needed has rounded the global batch size down."""
    size, multiple = c["batch.global_batch_size"], c["batch.batch_multiple"]
    if size is not None and (rest := size % multiple):
        yield f"the global batch has {size - rest} samples, not {size}: it must be a multiple of {multiple}"


RULES = Rules(
    every_run=(micro_batch_given, global_batch, skipped_iterations),
    pretraining=(run_length_given, ramp_up, step_sizes, some_training),
    disk=(stop_file,),
    remarks=(remarks,),
)
