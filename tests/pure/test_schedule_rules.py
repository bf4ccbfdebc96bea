"""The rules of what changes over a run: learning rates of WSD, the warm-up's begin, batch sizes step by step."""

from __future__ import annotations

import tomllib

import pytest
from legal_run import argv, problems

from megatron.config.command_line.parse import parse
from megatron.config.command_line.saved import from_json, to_json, to_toml
from megatron.config.resolve import resolve

STEPS = "--step-batch-size-schedule"
SAMPLES = "--no:train-iters --train-samples 100"

CASES = [
    ("--lr-decay-style WSD", "`--lr-decay-style WSD` needs `--lr-wsd-decay-iters`, the length of the decay at its end"),
    (
        f"--lr-decay-style WSD {SAMPLES}",
        "`--lr-decay-style WSD` needs `--lr-wsd-decay-samples`, the length of the decay at its end",
    ),
    (
        "--lr-decay-style WSD --lr-wsd-decay-samples 4",
        "`--lr-wsd-decay-samples 4` conflicts with `--train-iters`: iterations and samples do not mix",
    ),
    (
        f"--lr-decay-style WSD --lr-wsd-decay-iters 4 {SAMPLES}",
        "`--lr-wsd-decay-iters 4` conflicts with `--train-samples`: iterations and samples do not mix",
    ),
    (
        "--lr-decay-style WSD --lr-wsd-decay-iters 7 --lr-warmup-iters 4",
        "`--lr-wsd-decay-iters 7` is longer than what the warm-up of 4 leaves of `--lr-decay-iters 10`; legal: 1 to 6",
    ),
    (
        f"--lr-decay-style WSD --lr-wsd-decay-samples 91 --lr-warmup-fraction 0.1 {SAMPLES}",
        "`--lr-wsd-decay-samples 91` is longer than what the warm-up of 10 leaves of `--lr-decay-samples 100`; legal: 1 to 90",
    ),
    ("--lr-decay-style WSD --lr-wsd-decay-iters 0", "`--lr-wsd-decay-iters 0` must be greater than 0"),
    (
        "--lr-decay-style WSD --lr-wsd-decay-iters 2 --lr-wsd-decay-style sqrt",
        "`--lr-wsd-decay-style sqrt` is not known; legal: exponential, linear, cosine, minus_sqrt",
    ),
    (
        "--lr-warmup-init 0.1 --lr-warmup-iters 2",
        "`--lr-warmup-init 0.1` is greater than `--lr 0.001`, where the warm-up ends; legal: 0 to 0.001",
    ),
    ("--lr-warmup-init -1", "`--lr-warmup-init -1.0` must be 0 or greater"),
    ("--decoupled-min-lr 1e-5", "`--decoupled-min-lr 1e-05` needs `--decoupled-lr`"),
    (
        "--decoupled-lr 1e-4 --min-lr 5e-4",
        "`--min-lr 0.0005` is greater than `--decoupled-lr 0.0001`; legal: 0 to 0.0001, also by --decoupled-min-lr",
    ),
    (
        f"{STEPS} 0:2 256=4",
        f"`{STEPS} 0:2 256=4` has the entry 256=4, which is not TOKENS:SIZE, such as 0:768 or 250B:1536",
    ),
    (
        f"{STEPS} 0:2 1G:4",
        f"`{STEPS} 0:2 1G:4` has the entry 1G:4, which is not TOKENS:SIZE, such as 0:768 or 250B:1536",
    ),
    (f"{STEPS} 0:0", f"`{STEPS} 0:0` has the size 0, which is not a whole number from 1 to 1,048,576"),
    (f"{STEPS} 0:2.5", f"`{STEPS} 0:2.5` has the size 2.5, which is not a whole number from 1 to 1,048,576"),
    (f"{STEPS} 8:2 16:4", f"`{STEPS} 8:2 16:4` does not give the size at the start; its first entry is 0:SIZE"),
    (
        f"{STEPS} 0:2 16:4 23:6",
        f"`{STEPS} 0:2 16:4 23:6` has two sizes from sample 2 on (tokens / `--seq-length 8`, rounded down)",
    ),
    (
        f"{STEPS} 0:2 16:4 --global-batch-size 8",
        f"`{STEPS} 0:2 16:4` and `--global-batch-size 8` exclude each other: the schedule sets every size, and its last one is "
        "the global batch size",
    ),
    (
        f"{STEPS} 0:2 16:5 32:6 64:7",
        f"`{STEPS} 0:2 16:5 32:6 64:7` has the sizes 5, 7, not divisible by `--micro-batch-size 2` x 1 data-parallel ranks; "
        "legal: multiples of 2",
    ),
    (
        f"{STEPS} 0:4 80:8 --no:train-iters --train-samples 3",
        "`--train-samples 3` is less than one global batch of 4 samples",
    ),
]


@pytest.mark.parametrize(("change", "message"), CASES)
def test_a_mistake_has_one_message(change: str, message: str) -> None:
    assert problems(change) == [message]


def test_a_ramp_up_and_a_schedule_exclude_each_other() -> None:
    both = f"{STEPS} 0:2 16:8 --rampup-batch-size 2 2 8 --global-batch-size 8 {SAMPLES}"
    decreased = f"{STEPS} 0:2 16:8 --decrease-batch-size-if-needed"
    assert problems(decreased) == [
        f"`{STEPS} 0:2 16:8` and `--decrease-batch-size-if-needed` exclude each other; give one of them"
    ]
    assert problems(both) == [f"`{STEPS} 0:2 16:8` and `--rampup-batch-size 2 2 8` exclude each other; give one of them"]


@pytest.mark.parametrize(
    "change",
    [
        "--lr-decay-style WSD --lr-wsd-decay-iters 6 --lr-warmup-iters 4 --lr-warmup-init 1e-4",
        f"--lr-decay-style WSD --lr-wsd-decay-samples 30 --lr-decay-samples 80 --lr-wsd-decay-style minus_sqrt {SAMPLES}",
        f"{STEPS} 0:2 256:4",
        f"{STEPS} 0:2,256:4 --global-batch-size 4 {SAMPLES}",  # as a saved configuration says it
    ],
)
def test_what_is_legal_is_saved_and_read_again(change: str) -> None:
    config = parse(argv(change), program="t", check_disk=False).config
    assert resolve(from_json(to_json(config))) == config
    text = to_toml(config)
    assert "batch-size-steps" not in text and "step-batch-size-schedule" in text
    values = tomllib.loads(text)["batch"]["step-batch-size-schedule"]
    assert tuple(values) == config.batch.step_batch_size_schedule


def test_smaller_sizes_may_lie_behind_a_run_that_goes_on() -> None:
    """They are checked when the checkpoint is found."""
    assert problems(f"{STEPS} 0:2 64:8", 4) != []
    assert (
        problems(f"{STEPS} 0:2 64:8 --load x", 4)
        == []
        == problems(f"{STEPS} 0:2 64:8 --auto-resume --save x --save-interval 1", 4)
    )


def test_what_has_no_effect_is_said() -> None:
    notes = parse(
        argv("--lr-wsd-decay-iters 3 --lr-wsd-decay-style cosine --lr-warmup-init 1e-5"), program="t", check_disk=False
    ).notes
    assert notes == (
        "--lr-wsd-decay-style and --lr-wsd-decay-iters change nothing: --lr-decay-style is linear, not WSD",
        "--lr-warmup-init changes nothing: there is no warm-up",
    )
