"""The schedule of a resumed run: refused where it differs and nobody said which one counts; never at rate 0 by chance."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError
from megatron.config.resolve import resolve
from megatron.config.schema import BatchSettings, DataSettings, ModelSettings, OptimSettings, RunConfig, RunSettings
from megatron.optim.lr import LRSchedule
from megatron.train.resumed_schedule import check_batch_sizes, check_schedule, choose_schedule, zero_rate_warning
from megatron.train.source import StateSource
from megatron.train.state import TrainState

STYLES = ("linear", "cosine", "constant", "inverse-square-root", "WSD")
MODEL = ModelSettings(num_layers=1, hidden_size=8, num_attention_heads=1, max_position_embeddings=8)
DATA = DataSettings(seq_length=8)
WSD = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2}


def run(iters: int = 4, size: int = 4, samples: int | None = None, **optim: object) -> RunConfig:
    length = {"train_samples": samples} if samples else {"train_iters": iters}
    batch = BatchSettings(micro_batch_size=1, global_batch_size=size, **length)
    return resolve(RunSettings(model=MODEL, data=DATA, optim=OptimSettings(**{"lr": 1e-3, **optim}), batch=batch))


def saved_checkpoint(config: RunConfig, iteration: int = 4) -> StateSource:
    """The checkpoint of a run at an iteration."""
    done = iteration * config.batch.global_batch_size
    schedule = asdict(LRSchedule.from_config(config.optim, config.batch))
    state = TrainState(iteration=iteration, consumed_samples=done, scheduled_samples=done, schedule=schedule)
    return StateSource(Path("run/iter_0000004"), config, state, optimizer=True, progress=True)


# What changes, a part of what is said of it, the checkpoint's value and the command's.
CHANGES = [
    (run(8), "`--train-iters 8` x `--global-batch-size 4`", 16, 32),
    (run(4, size=8), "`--train-iters 4` x `--global-batch-size 8`", 16, 32),
    (run(8, lr_decay_iters=6), "`--lr-decay-iters 6` x `--global-batch-size 4`", 16, 24),
    (run(samples=20), "`--train-samples 20`", 16, 20),
    (run(lr=2e-3), "`--lr`", 0.001, 0.002),
    (run(min_lr=1e-5), "`--min-lr`", 0.0, 1e-05),
    (run(lr_decay_style="cosine"), "`--lr-decay-style`", "linear", "cosine"),
    (run(lr_warmup_iters=2), "`--lr-warmup-iters 2` x `--global-batch-size 4`", 0, 8),
    (run(lr_warmup_fraction=0.25), "`--lr-warmup-fraction 0.25` of the decay", 0, 4),
    (run(weight_decay=0.1), "`--weight-decay`", 0.01, 0.1),
]


CHANGES += [(run(decoupled_lr=1e-4), "for word embedding and output layer (`--decoupled-lr`)", False, True)]
# The same from a run of WSD with a warm-up.
WSD_CHANGES = [
    (run(**WSD | {"lr_wsd_decay_iters": 1}, lr_warmup_iters=1), "`--lr-wsd-decay-iters 1` x `--global-batch-size 4`", 8, 4),
    (run(**WSD, lr_warmup_iters=1, lr_wsd_decay_style="cosine"), "`--lr-wsd-decay-style`", "exponential", "cosine"),
    (run(**WSD, lr_warmup_iters=1, lr_warmup_init=1e-5), "`--lr-warmup-init`", 0.0, 1e-05),
]


@pytest.mark.parametrize(("asked", "what", "held", "wanted"), [*CHANGES, *WSD_CHANGES])
def test_what_differs_is_refused_until_somebody_says_which_counts(asked, what, held, wanted):
    old_run = run(**WSD, lr_warmup_iters=1) if asked.optim.lr_decay_style == "WSD" else run()
    source = saved_checkpoint(old_run)
    with pytest.raises(ConfigError) as caught:
        check_schedule(source, asked)
    (problem,) = map(str, caught.value.problems)
    assert what in problem and f"is {wanted}; the schedule of run/iter_0000004 has {held}; legal: " in problem
    assert "--override-opt_param-scheduler" in problem and "--use-checkpoint-opt_param-scheduler" in problem
    new = replace(asked, optim=replace(asked.optim, override_opt_param_scheduler=True))
    old = replace(asked, optim=replace(asked.optim, use_checkpoint_opt_param_scheduler=True))
    for config in (new, old):
        check_schedule(source, config)
    assert choose_schedule(source, new) == LRSchedule.from_config(asked.optim, asked.batch)
    assert choose_schedule(source, old) == LRSchedule.from_config(old_run.optim, old_run.batch)


def test_changes_without_effect_on_the_schedule_are_silent():
    for config in (run(), run(lr_decay_iters=4), run(4, lr_warmup_fraction=0.0), run(start_weight_decay=0.01)):
        check_schedule(saved_checkpoint(run()), config)
    constant = {"lr_decay_style": "constant"}
    check_schedule(saved_checkpoint(run(**constant)), run(8, **constant))  # the length of no decay
    growing = {"weight_decay_incr_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 0.1}
    with pytest.raises(ConfigError, match="length of the change of weight decay"):
        check_schedule(saved_checkpoint(run(**constant, **growing)), run(8, **constant, **growing))
    with pytest.raises(ConfigError, match=r"`--end-weight-decay` is 0\.2"):
        check_schedule(saved_checkpoint(run(**growing)), run(**growing | {"end_weight_decay": 0.2}))
    check_schedule(saved_checkpoint(run()), run(lr_wsd_decay_style="cosine", lr_warmup_init=1e-4))  # of no WSD, of no warm-up
    check_schedule(replace(saved_checkpoint(run()), progress=False), run(8))  # --finetune
    check_schedule(StateSource(state=TrainState(iteration=0)), run(8))  # imported weights
    check_schedule(saved_checkpoint(run()), replace(run(8), eval=replace(run().eval, skip_train=True)))


@pytest.mark.parametrize("style", STYLES)
def test_the_next_step_has_the_rate_of_the_schedule_that_counts(style):
    """To the last bit, wherever the run stands; skipped steps moved neither."""
    old = run(10, lr_decay_style=style, lr_wsd_decay_iters=4)
    asked = run(20, size=8, lr=3e-3, min_lr=1e-4, lr_decay_style=style, lr_wsd_decay_iters=5, lr_warmup_iters=3)
    new = replace(asked, optim=replace(asked.optim, override_opt_param_scheduler=True))
    for iteration in range(1, 11):
        source = saved_checkpoint(old, iteration)
        at = source.state.scheduled_samples
        assert choose_schedule(source, new).rate(at) == LRSchedule.from_config(asked.optim, asked.batch).rate(at)
        kept = replace(asked, optim=replace(asked.optim, use_checkpoint_opt_param_scheduler=True))
        assert choose_schedule(source, kept).rate(at) == LRSchedule.from_config(old.optim, old.batch).rate(at)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ramp", [{}, {"rampup_batch_size": (2, 2, 12)}, {"batch_size_steps": (0, 2, 7, 6, 16, 4)}])
@pytest.mark.parametrize(("begun", "decay"), [(0, 5), (0, 12), (3, 5), (8, 5)])
def test_iterations_at_rate_zero_are_foretold(style, ramp, begun, decay):
    """Those that a walk through the run finds."""
    from megatron.config.batch import global_batch_size_at

    batch = replace(run(12).batch, **ramp)
    for floor, warmup in ((0.0, 0), (0.0, 3), (1e-9, 0)):
        schedule = LRSchedule(1e-3, floor, style, warmup, 4 * decay, 0.0, 0.0, "constant", annealing=6)
        consumed, zero, state = 0, [], TrainState()
        for iteration in range(1, 13):
            if iteration == begun + 1:
                state = TrainState(iteration=begun, consumed_samples=consumed, scheduled_samples=consumed)
            if iteration > begun and consumed > 0 and schedule.rate(consumed) == 0.0:
                zero.append(iteration)
            consumed += global_batch_size_at(batch, consumed)
        line = zero_rate_warning(schedule, state, batch)
        assert (line is None) == (zero == [])
        if line is not None and len(zero) > 1:
            assert f"iterations {zero[0]} to {zero[-1]} lie beyond the end" in line and zero[-1] == 12


def test_a_checkpoint_that_says_nothing_of_what_came_later():
    """Its weight decay went on growing as long as its learning rate fell, and does so."""
    growing = {"weight_decay_incr_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 0.2}
    config = run(8, lr_decay_iters=4, **growing)
    source = saved_checkpoint(config)
    for name in ("decay_weights_over", "initial", "annealing", "annealing_style"):
        del source.state.schedule[name]
    kept = replace(config, optim=replace(config.optim, use_checkpoint_opt_param_scheduler=True))
    assert choose_schedule(source, kept).weight_decay(8) == pytest.approx(0.1)
    with pytest.raises(ConfigError, match=r"change of weight decay in samples \(`--train-iters 8` .* is 32; .* has 16"):
        check_schedule(source, config)


def test_more_ranks_go_on_with_the_sizes_that_are_left():
    batch = BatchSettings(micro_batch_size=1, step_batch_size_schedule=("0:2 64:8",), train_iters=9)
    config = resolve(RunSettings(model=MODEL, data=DATA, batch=batch, optim=OptimSettings(lr=1e-3)), 8)
    behind = StateSource(state=TrainState(consumed_samples=8), progress=True)
    check_batch_sizes(behind, config, 8)
    for source in (replace(behind, progress=False), StateSource(state=TrainState(consumed_samples=6), progress=True)):
        with pytest.raises(
            ConfigError, match="has the sizes 2, not divisible by `--micro-batch-size 1` x 8 data-parallel ranks"
        ):
            check_batch_sizes(source, config, 8)
