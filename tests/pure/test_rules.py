"""Every rule: silent on a legal run, and with its own message on an illegal one."""

from __future__ import annotations

import pytest
from legal_run import problems

from megatron.config import memory, pipeline, precision
from megatron.config.batch import skipped_iterations, step_sizes
from megatron.config.data import shortest_pair
from megatron.config.layout import context_dropout, context_split, param_gather
from megatron.config.model import normalization_package, other_architecture_settings
from megatron.config.optim import adam_kernel, decoupled_rates, optimizer_package, warm_up_start, wsd_phases
from megatron.config.options import options
from megatron.config.rules import DISK_RULES, PRETRAINING_RULES, check
from megatron.config.schema import ModelSettings, RunSettings

# rule, change to the legal run, world size, the whole message
CASES: list[tuple[str, str, int, str]] = [
    ("sizes_given", "--no:hidden-size", 1, "`--hidden-size` is missing, and has no default"),
    ("run_length_given", "--no:train-iters", 1, "`--train-iters` (or `--train-samples`) is missing, and has no default"),
    ("sizes_given", "--no:max-position-embeddings", 1, "`--max-position-embeddings` is missing, and has no default"),
    ("sample_length_given", "--no:seq-length", 1, "`--seq-length` is missing, and has no default"),
    ("micro_batch_given", "--no:micro-batch-size", 1, "`--micro-batch-size` is missing, and has no default"),
    ("learning_rate_given", "--no:lr", 1, "`--lr` is missing, and has no default"),
    ("tokenizer_given", "--no:tokenizer-type", 1, "`--tokenizer-type` is missing, and has no default"),
    (
        "head_width",
        "--hidden-size 18",
        1,
        "`--hidden-size 18` is not divisible by `--num-attention-heads 4`; legal: 1, 2, 3, 6, 9, 18",
    ),
    (
        "query_groups",
        "--num-query-groups 3",
        1,
        "`--num-attention-heads 4` is not divisible by `--num-query-groups 3`; legal: 1, 2, 4",
    ),
    (
        "tensor_split",
        "--num-attention-heads 12 --hidden-size 48 --tensor-model-parallel-size 8",
        8,
        "`--num-attention-heads 12` is not divisible by `--tensor-model-parallel-size 8`; legal: 1, 2, 3, 4, 6, 12",
    ),
    (
        "tensor_split",
        "--ffn-hidden-size 9 --tensor-model-parallel-size 2",
        2,
        "`--ffn-hidden-size 9` is not divisible by `--tensor-model-parallel-size 2`; legal: 1, 3, 9",
    ),
    (
        "tensor_split",
        "--num-query-groups 1 --tensor-model-parallel-size 2",
        2,
        "`--num-query-groups 1` is not divisible by `--tensor-model-parallel-size 2`; legal: 1",
    ),
    (
        "tensor_split",
        "--seq-length 7 --sequence-parallel --tensor-model-parallel-size 2",
        2,
        "`--seq-length 7` is not divisible by `--tensor-model-parallel-size 2` under `--sequence-parallel`; legal: 1, 7",
    ),
    (
        "rotary_width",
        "--position-embedding-type rope --kv-channels 3",
        1,
        "`--rotary-percent 1.0` rotates 3 of the 3 channels of a head, which must be an even number of at least 2",
    ),
    ("positions", "--seq-length 9", 1, "`--max-position-embeddings 8` is less than `--seq-length 9`; legal: 9 or more"),
    (
        "world_size",
        "--tensor-model-parallel-size 2",
        3,
        "world size 3 is not divisible by `--tensor-model-parallel-size 2`; legal: multiples of 2, such as 2",
    ),
    (
        "world_size",
        "--tensor-model-parallel-size 4",
        2,
        "world size 2 is not divisible by `--tensor-model-parallel-size 4`; legal: multiples of 4, such as 4",
    ),
    (
        "global_batch",
        "--global-batch-size 10",
        2,
        "`--global-batch-size 10` is not divisible by `--micro-batch-size 2` x 2 data-parallel ranks = 4; "
        "legal: multiples of 4",
    ),
    (
        "ramp_up",
        "--rampup-batch-size 2 2 --train-samples 99 --no:train-iters --global-batch-size 8",
        1,
        "`--rampup-batch-size 2 2` must be three numbers above 0: START INCREMENT SAMPLES",
    ),
    (
        "ramp_up",
        "--rampup-batch-size 2 2 9 --global-batch-size 8",
        1,
        "`--rampup-batch-size 2 2 9` and `--train-iters 10` exclude each other; use --train-samples with a ramp-up",
    ),
    (
        "ramp_up",
        "--rampup-batch-size 2 4 9 --train-samples 99 --no:train-iters --global-batch-size 8",
        1,
        "`--rampup-batch-size 2 4 9` does not reach `--global-batch-size 8` from 2 in steps of 4",
    ),
    (
        "ramp_up",
        "--rampup-batch-size 2 2 9 --train-samples 99 --no:train-iters",
        1,
        "`--rampup-batch-size 2 2 9` needs `--global-batch-size`, the size at its end",
    ),
    (
        "ramp_up",
        "--rampup-batch-size 2 2 9 --train-samples 99 --no:train-iters --global-batch-size 8",
        2,
        "`--rampup-batch-size 2 2 9` passes through 2, 6, not divisible by `--micro-batch-size 2` x 2 data-parallel ranks; "
        "legal: START and INCREMENT multiples of 4",
    ),
    (
        "some_training",
        "--train-samples 3 --no:train-iters --global-batch-size 4",
        1,
        "`--train-samples 3` is less than one global batch of 4 samples",
    ),
    ("one_unit", "--train-samples 99", 1, "`--train-iters 10` and `--train-samples 99` exclude each other; give one of them"),
    (
        "one_unit",
        "--lr-decay-samples 9",
        1,
        "`--lr-decay-samples 9` conflicts with `--train-iters`: iterations and samples do not mix",
    ),
    (
        "one_unit",
        "--lr-warmup-iters 9 --train-samples 99 --no:train-iters",
        1,
        "`--lr-warmup-iters 9` conflicts with `--train-samples`: iterations and samples do not mix",
    ),
    (
        "warm_up",
        "--lr-warmup-fraction 0.1 --lr-warmup-iters 2",
        1,
        "`--lr-warmup-fraction 0.1` and `--lr-warmup-iters 2` exclude each other; give one of them",
    ),
    (
        "warm_up",
        "--lr-warmup-iters 10",
        1,
        "`--lr-warmup-iters 10` is not less than `--lr-decay-iters 10`, where the decay ends; legal: 0 to 9",
    ),
    ("learning_rates", "--min-lr 0.1", 1, "`--min-lr 0.1` is greater than `--lr 0.001`; legal: 0 to 0.001"),
    (
        "weight_decay_growth",
        "--start-weight-decay 0.1",
        1,
        "`--start-weight-decay 0.1` cannot be combined with `--weight-decay-incr-style constant`; "
        "legal: --weight-decay-incr-style linear or cosine",
    ),
    (
        "weight_decay_growth",
        "--weight-decay-incr-style cosine --start-weight-decay 0",
        1,
        "`--weight-decay-incr-style cosine` needs `--end-weight-decay`",
    ),
    ("saving", "--save x", 1, "`--save x` needs `--save-interval` or `--save-interval-mins`"),
    ("no_task", "--task MNLI", 1, "`--task MNLI` belongs to tasks/main.py; leave it out"),
    ("checkpoint_companions", "--save-interval-mins 5", 1, "`--save-interval-mins 5.0` needs `--save`"),
    ("checkpoint_companions", "--async-save", 1, "`--async-save` needs `--save`"),
    ("checkpoint_companions", "--on-save-error continue", 1, "`--on-save-error continue` needs `--save`"),
    ("checkpoint_companions", "--auto-resume", 1, "`--auto-resume` needs `--save`"),
    ("checkpoint_companions", "--keep-last 2", 1, "`--keep-last 2` needs `--save`"),
    ("checkpoint_companions", "--keep-every 2", 1, "`--keep-every 2` needs `--save`"),
    ("checkpoint_companions", "--overwrite", 1, "`--overwrite` needs `--save`"),
    ("checkpoint_companions", "--finetune", 1, "`--finetune` needs `--load`"),
    ("checkpoint_companions", "--load-iteration 5", 1, "`--load-iteration 5` needs `--load`"),
    ("checkpoint_companions", "--use-checkpoint-args", 1, "`--use-checkpoint-args` needs `--load`"),
    (
        "optim_companions",
        "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler",
        1,
        "`--override-opt_param-scheduler` and `--use-checkpoint-opt_param-scheduler` exclude each other; give one of them",
    ),
    (
        "split",
        "--split a,b",
        1,
        "`--split a,b` is not up to three shares of training, validation and test; legal: e.g. 969,30,1",
    ),
    (
        "split",
        "--split 0,0",
        1,
        "`--split 0,0` is not up to three shares of training, validation and test; legal: e.g. 969,30,1",
    ),
    (
        "split",
        "--split 1,1,1,1",
        1,
        "`--split 1,1,1,1` is not up to three shares of training, validation and test; legal: e.g. 969,30,1",
    ),
    ("data_paths", "--no:data-path", 1, "`--data-path` is missing, and has no default"),
    (
        "data_paths",
        "--train-data-path x",
        1,
        "`--data-path` and `--train-data-path` exclude each other: the first is divided by --split, the second is one split",
    ),
    (
        "data_paths",
        "--data-path 0.5 a b",
        1,
        "`--data-path 0.5 a b` mixes weights and prefixes; "
        "several datasets are WEIGHT PREFIX WEIGHT PREFIX ... or PREFIX PREFIX ...",
    ),
    (
        "data_paths",
        "--data-path 0 a 1 b",
        1,
        "`--data-path 0 a 1 b` has the weight 0; weights are greater than 0: leave the dataset out instead",
    ),
    (
        "tokenizer_settings",
        "--tokenizer-type NullTokenizer",
        1,
        "`--tokenizer-type NullTokenizer` needs `--vocab-size`, the number of ids",
    ),
    (
        "tokenizer_settings",
        "--tokenizer-type GPT2BPETokenizer --vocab-file v",
        1,
        "`--tokenizer-type GPT2BPETokenizer` needs `--merge-file`",
    ),
    (
        "tokenizer_settings",
        "--tokenizer-type HuggingFaceTokenizer",
        1,
        "`--tokenizer-type HuggingFaceTokenizer` needs `--tokenizer-model`",
    ),
]


@pytest.mark.parametrize(("rule", "change", "world", "message"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_rule_has_its_message(rule: str, change: str, world: int, message: str) -> None:
    assert problems(change, world) == [message]


def test_every_rule_is_tested() -> None:
    # See test_context_rules.py and its like, test_new_schedule.py and test_toy_norm.py.
    elsewhere = {*memory.RULES.every_run, *pipeline.RULES.every_run, *precision.RULES.every_run}
    elsewhere |= {other_architecture_settings, shortest_pair, context_split, context_dropout, param_gather, adam_kernel}
    elsewhere |= {
        normalization_package,
        skipped_iterations,
        step_sizes,
        wsd_phases,
        warm_up_start,
        decoupled_rates,
        optimizer_package,
    }
    assert elsewhere < set(PRETRAINING_RULES)
    assert {r.__name__ for r in PRETRAINING_RULES if r not in elsewhere} == {case[0] for case in CASES}
    # See test_file_rules.py, and for the third test_task_rules.py.
    files = ["tokenizer_files", "datasets", "stop_file", "load_directory", "task_files", "writable"]
    assert [r.__name__ for r in DISK_RULES] == files


@pytest.mark.parametrize(
    ("change", "world"),
    [
        ("", 1),
        ("--hidden-size 18 --kv-channels 4", 1),
        ("--num-query-groups 2 --tensor-model-parallel-size 2", 2),
        ("--seq-length 7 --sequence-parallel", 1),
        ("--position-embedding-type rope --no:max-position-embeddings", 1),
        ("--global-batch-size 12", 2),
        ("--rampup-batch-size 4 4 16 --train-samples 99 --no:train-iters --global-batch-size 16", 2),
        ("--rampup-batch-size 2 2 9 --train-samples 8 --no:train-iters --global-batch-size 8", 1),  # ends within the ramp-up
        ("--lr-warmup-fraction 0.1 --lr-decay-iters 20", 1),
        ("--lr-decay-style constant --min-lr 1e-3", 1),
        ("--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1", 1),
        ("--save x --save-interval 5 --auto-resume --keep-last 2", 1),
        ("--save x --save-interval-mins 5 --async-save --on-save-error continue", 1),
        ("--data-path 0.5 a 2 b", 1),
        ("--data-path a b c", 1),
        ("--no:data-path --train-data-path a --valid-data-path b", 1),
        ("--split 100", 1),
        ("--skip-train --no:lr --no:train-iters", 1),
        ("--tokenizer-type NullTokenizer --vocab-size 100", 1),
        ("--normalization RMSNorm --apply-layernorm-1p --swiglu --disable-bias-linear", 1),
        ("--pipeline-schedule 1f1b --pipeline-model-parallel-size 1", 1),
        ("--pipeline-schedule gpipe --compile", 1),
        ("--pipeline-schedule zb-h1", 1),
        ("--pipeline-model-parallel-size 2", 4),
        ("--pipeline-model-parallel-size 2 --pipeline-schedule zb-h2 --global-batch-size 2", 2),
        ("--pipeline-model-parallel-size 2 --pipeline-schedule zb-v --num-layers 5", 2),
        ("--num-layers 7 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1", 2),
        ("--num-layers 7 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 4", 2),
        ("--pipeline-model-parallel-size 4 --pipeline-stage-layers 0 1 1 0", 4),
        ("--pipeline-stage-layers 2", 1),
        ("--pipeline-stage-layers", 1),
    ],
)
def test_legal_runs_are_silent(change: str, world: int) -> None:
    assert problems(change, world) == []


def test_one_mistake_in_the_pipeline_is_told_once() -> None:
    assert problems("--pipeline-model-parallel-size 0 --pipeline-schedule zb-v --num-layers 1") == [
        "`--pipeline-model-parallel-size 0` must be greater than 0"
    ]
    schedules = "gpipe, 1f1b, interleaved, zb-h1, zb-h2, zb-v"
    assert problems("--pipeline-schedule zb --num-layers-per-virtual-pipeline-stage 1") == [
        f"`--pipeline-schedule zb` is not known; legal: {schedules}"
    ]
    # What the number of stages follows from is wrong: nothing is said of a cut into that number.
    four = "--num-layers 4 --pipeline-model-parallel-size 2 --pipeline-stage-layers 1 1 1 1 --pipeline-schedule"
    assert len(problems(f"{four} interleaved", 2)) == 1 and len(problems(f"{four} 1f1b", 2)) == 1
    assert len(problems(f"{four} 1f1b --num-layers-per-virtual-pipeline-stage 1", 2)) == 1


def test_every_number_has_a_range_and_its_message() -> None:
    numbers = {o.name: o for o in options() if o.kind in (int, float) and not o.many and o.section != "command"}
    assert all(option.legal is not None for option in numbers.values())
    assert not [o.name for o in options() if o.legal is not None and o.name not in numbers]
    for name, option in numbers.items():
        word = "-1" if option.kind is int else "-0.5"
        lines = problems(f"{option.flag} {word}")
        assert lines == [f"`{option.flag} {word}` must be {option.legal.text}"], name
    assert problems("--attention-dropout 1.0") == ["`--attention-dropout 1.0` must be at least 0 and less than 1"]
    assert problems("--num-layers 0") == ["`--num-layers 0` must be greater than 0 and at most 65,536"]
    assert problems("--num-layers 65537") == ["`--num-layers 65537` must be greater than 0 and at most 65,536"]
    assert problems(f"--global-batch-size {10**30}")[0].endswith("0` must be greater than 0 and at most 1,048,576")


def test_check_works_from_python() -> None:
    model = ModelSettings(num_layers=2, hidden_size=16, num_attention_heads=4, max_position_embeddings=8, activation="tanh")
    lines = [str(p) for p in check(RunSettings(model=model))]
    assert any(line.startswith("`--activation tanh` is not known; legal: gelu, ") for line in lines)
    assert "`--seq-length` is missing, and has no default" in lines
