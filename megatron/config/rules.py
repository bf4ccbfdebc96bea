"""What makes a configuration legal: one short function per rule, in a list. None of them touches the disk.

A rule looks at a `Case` and answers with its problems. It keeps silent about settings that are missing or out of their
range, since other rules speak of those, so that each mistake is reported once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from math import inf

from megatron.config.architecture_rules import ARCHITECTURE_RULES
from megatron.config.batch_size import global_batch_size_at, ramp_sizes
from megatron.config.case import Case, Rule, divisors
from megatron.config.context_rules import CONTEXT_RULES
from megatron.config.errors import Problem
from megatron.config.optim_rules import OPTIM_RULES
from megatron.config.options import by_name
from megatron.config.pipeline_rules import PIPELINE_RULES, split_remarks
from megatron.config.precision_rules import PRECISION_RULES, precision_remarks
from megatron.config.ranges import out_of_range
from megatron.config.recompute_rules import RECOMPUTE_RULES
from megatron.config.resolve import data_parallel_size, resolve
from megatron.config.schedule_rules import SCHEDULE_RULES, batch_remarks, schedule_remarks, step_sizes, unit_of
from megatron.config.schema import RunConfig
from megatron.config.shares import split_shares
from megatron.config.stage_split import pipeline_chunks


def required(c: Case) -> Iterator[Problem]:
    """A run needs its sizes and its learning rate."""
    names = ["model.num_layers", "model.hidden_size", "model.num_attention_heads", "data.seq_length", "batch.micro_batch_size"]
    if c["model.position_embedding_type"] == "learned_absolute":
        names.append("model.max_position_embeddings")
    if not c["eval.skip_train"]:
        names.append("optim.lr")
    yield from missing(c, names)


def required_to_pretrain(c: Case) -> Iterator[Problem]:
    """A run that no task describes also needs its length and its tokenizer."""
    open_length = c["batch.train_samples"] is None and "batch.train_samples" not in c.bad
    if not c["eval.skip_train"] and open_length and not c.given("task.epochs"):  # no_task speaks of epochs
        yield from missing(c, ["batch.train_iters"])
    yield from missing(c, ["tokenizer.tokenizer_type"])


def missing(c: Case, names: Sequence[str]) -> Iterator[Problem]:
    """A problem for each of these settings that is open."""
    for name in names:
        if c[name] in (None, ()) and name not in c.bad:
            other = " (or `--train-samples`)" if name == "batch.train_iters" else ""
            yield Problem(f"`{by_name()[name].flag}`{other}", "is missing, and has no default")


def head_width(c: Case) -> Iterator[Problem]:
    """Heads share the hidden size evenly, unless --kv-channels says otherwise."""
    hidden, heads = c["model.hidden_size"], c["model.num_attention_heads"]
    if c["model.kv_channels"] is None and hidden and heads and hidden % heads and "model.kv_channels" not in c.bad:
        yield Problem(
            c.flag_text("model.hidden_size"), f"is not divisible by `--num-attention-heads {heads}`", divisors(hidden, 32)
        )


def query_groups(c: Case) -> Iterator[Problem]:
    """Each group of queries has the same number of heads."""
    heads, groups = c["model.num_attention_heads"], c["model.num_query_groups"]
    if heads and groups and heads % groups:
        rule = f"is not divisible by `--num-query-groups {groups}`"
        yield Problem(c.flag_text("model.num_attention_heads"), rule, divisors(heads))


def tensor_split(c: Case) -> Iterator[Problem]:
    """Heads, groups and MLP width split evenly over tensor parallelism; with it the sequence, where that is split."""
    tp = c["layout.tensor_model_parallel_size"]
    names = ["model.num_attention_heads", "model.ffn_hidden_size"]
    if c.given("model.num_query_groups"):
        names.append("model.num_query_groups")
    if c["layout.sequence_parallel"]:
        names.append("data.seq_length")
    for name in names:
        if c[name] and c[name] % tp:
            why = " under `--sequence-parallel`" if name == "data.seq_length" else ""
            rule = f"is not divisible by `--tensor-model-parallel-size {tp}`{why}"
            yield Problem(c.flag_text(name), rule, divisors(c[name]))


def rotary_width(c: Case) -> Iterator[Problem]:
    """RoPE turns pairs of numbers."""
    kv, percent = c["model.kv_channels"], c["model.rotary_percent"]
    if c["model.position_embedding_type"] == "rope" and kv and (int(kv * percent) < 2 or int(kv * percent) % 2):
        rule = f"turns {int(kv * percent)} of the {kv} channels of a head, which must be an even number of at least 2"
        yield Problem(c.flag_text("model.rotary_percent"), rule)


def positions(c: Case) -> Iterator[Problem]:
    """The model must see a whole sample."""
    most, length = c["model.max_position_embeddings"], c["data.seq_length"]
    if most and length and most < length:
        yield Problem(
            c.flag_text("model.max_position_embeddings"), f"is less than `--seq-length {length}`", f"{length} or more"
        )


def world_size(c: Case) -> Iterator[Problem]:
    """The axes other than data parallelism divide the world."""
    names = ["layout.tensor_model_parallel_size", "layout.pipeline_model_parallel_size", "layout.context_parallel_size"]
    if c.dp is None and c.world > 0 and not c.bad & set(names):
        sizes = [name for name in names if c[name] != 1]
        size = c[names[0]] * c[names[1]] * c[names[2]]
        of = f" = {size}" if len(sizes) > 1 else ""
        ranks = fitting_ranks(c, size)
        legal = f"multiples of {size}" + (f", such as {ranks}" if ranks else "") + (" (--world-size)" if c.planning else "")
        yield Problem(f"world size {c.world}", f"is not divisible by {c.flag_text(*sizes)}{of}", legal, ranks)


def fitting_ranks(c: Case, size: int) -> int:
    """The number of ranks nearest to the world's, not above where that can be, over which the batch divides too; 0 for none.

    size: ranks that one copy of the model takes.
    """
    nearest = max(1, c.world // size)
    for copies in (*range(nearest, 0, -1), *range(nearest + 1, nearest + 65)):
        resolved = resolve(c.typed, size * copies)
        case = dataclasses.replace(c, resolved=resolved, world=size * copies, dp=copies)
        if not [*global_batch(case), *ramp_up(case)]:
            return int(case.world)
    return 0


def global_batch(c: Case) -> Iterator[Problem]:
    """Every rank does the same number of micro-batches in a step."""
    micro, size = c["batch.micro_batch_size"], c["batch.global_batch_size"]
    decreased = c["batch.decrease_batch_size_if_needed"] and size and size >= c["batch.batch_multiple"]
    if decreased or c["batch.step_batch_size_schedule"]:  # whose sizes have a rule of their own
        return
    if micro and size and c.dp and size % (micro * c.dp):
        rule = f"is not divisible by `--micro-batch-size {micro}` x {c.dp} data-parallel ranks = {micro * c.dp}"
        yield Problem(c.flag_text("batch.global_batch_size"), rule, f"multiples of {micro * c.dp}")


def ramp_up(c: Case) -> Iterator[Problem]:
    """START INCREMENT SAMPLES: whole steps from START to the global batch size, each of whole micro-batches."""
    ramp, size, micro = c["batch.rampup_batch_size"], c["batch.global_batch_size"], c["batch.micro_batch_size"]
    if not ramp or "batch.rampup_batch_size" in c.bad:
        return
    what = c.flag_text("batch.rampup_batch_size")
    if len(ramp) != 3 or min(ramp) <= 0:
        yield Problem(what, "must be three numbers above 0: START INCREMENT SAMPLES")
        return
    if c.iterations_chosen:
        yield Problem(
            f"{what} and {c.flag_text('batch.train_iters')}", "exclude each other; use --train-samples with a ramp-up"
        )
    if size is None or "batch.global_batch_size" in c.bad:
        return
    if not c.given("batch.global_batch_size"):
        yield Problem(what, "needs `--global-batch-size`, the size at its end")
    elif ramp[0] > size or (size - ramp[0]) % ramp[1]:
        yield Problem(what, f"does not reach `--global-batch-size {size}` from {ramp[0]} in steps of {ramp[1]}")
    elif ramp[0] < c["batch.batch_multiple"]:
        rule = f"begins with less than `--micro-batch-size {micro}` x {c.dp} data-parallel ranks = {c['batch.batch_multiple']}"
        yield Problem(what, rule)
    elif micro and c.dp and (uneven := [s for s in ramp_sizes(c.resolved.batch) if s % (micro * c.dp) and s != size]):
        sizes = ", ".join(map(str, uneven[:4])) + (", ..." if len(uneven) > 4 else "")
        rule = f"passes through {sizes}, not divisible by `--micro-batch-size {micro}` x {c.dp} data-parallel ranks"
        yield Problem(what, rule, f"START and INCREMENT multiples of {micro * c.dp}")


def some_training(c: Case) -> Iterator[Problem]:
    """The samples make at least one step."""
    samples, size, ramp = c["batch.train_samples"], c["batch.global_batch_size"], c["batch.rampup_batch_size"]
    if not samples or not size or (ramp and (len(ramp) != 3 or min(ramp) <= 0)):
        return
    if samples < (first := global_batch_size_at(c.resolved.batch, 0)):
        yield Problem(c.flag_text("batch.train_samples"), f"is less than one global batch of {first} samples")


def one_unit(c: Case) -> Iterator[Problem]:
    """A run is measured in iterations or in samples, and so is its schedule."""
    typed = c.typed
    if c.iterations_chosen and typed.batch.train_samples is not None:
        yield Problem(c.flag_text("batch.train_iters", "batch.train_samples"), "exclude each other; give one of them")
        return
    families = {
        "batch.train_iters": ("optim.lr_decay_samples", "optim.lr_warmup_samples", "optim.lr_wsd_decay_samples"),
        "batch.train_samples": ("optim.lr_decay_iters", "optim.lr_warmup_iters", "optim.lr_wsd_decay_iters"),
    }
    unit = f"batch.train_{unit_of(typed.batch)}"
    for name in families[unit]:
        if c[unit] is not None and c.given(name):
            yield Problem(c.flag_text(name), f"cannot go with `{by_name()[unit].flag}`: iterations and samples do not mix")


def warm_up(c: Case) -> Iterator[Problem]:
    """Warm-up is given once, and ends before the decay does."""
    explicit = [n for n in ("optim.lr_warmup_iters", "optim.lr_warmup_samples") if c.given(n) and n not in c.bad]
    if c["optim.lr_warmup_fraction"] is not None and explicit:
        yield Problem(c.flag_text("optim.lr_warmup_fraction", *explicit), "exclude each other; give one of them")
    for unit in ("iters", "samples"):
        warm, decay = c[f"optim.lr_warmup_{unit}"], c[f"optim.lr_decay_{unit}"]
        if warm and decay and warm >= decay:
            rule = f"is not less than `--lr-decay-{unit} {decay}`, where the decay ends"
            yield Problem(c.flag_text(f"optim.lr_warmup_{unit}"), rule, f"0 to {decay - 1}")


def learning_rates(c: Case) -> Iterator[Problem]:
    """The floor is not above the peak."""
    lr, low = c["optim.lr"], c["optim.min_lr"]
    if lr is not None and low > lr:
        yield Problem(c.flag_text("optim.min_lr"), f"is greater than `--lr {lr}`", f"0 to {lr}")


def weight_decay_growth(c: Case) -> Iterator[Problem]:
    """Start and end of the weight decay go with a style that changes it."""
    names = ("optim.start_weight_decay", "optim.end_weight_decay")
    typed = [getattr(c.typed.optim, name.split(".")[1]) for name in names]
    style = f"`--weight-decay-incr-style {c['optim.weight_decay_incr_style']}`"
    if c["optim.weight_decay_incr_style"] != "constant":
        missing = [by_name()[n].flag for n, v in zip(names, typed, strict=True) if v is None and n not in c.bad]
        if missing:
            yield Problem(style, f"needs {' and '.join(f'`{flag}`' for flag in missing)}")
    elif any(v is not None and v != c["optim.weight_decay"] for v in typed):
        spoken = c.flag_text(*(n for n, v in zip(names, typed, strict=True) if v is not None))
        yield Problem(spoken, f"cannot go with {style}", "--weight-decay-incr-style linear or cosine")


def companions(c: Case) -> Iterator[Problem]:
    """Settings that mean nothing without another."""
    needs = {
        "optim.decoupled_min_lr": "optim.decoupled_lr",
        "checkpoint.auto_resume": "checkpoint.save",
        "checkpoint.keep_last": "checkpoint.save",
        "checkpoint.keep_every": "checkpoint.save",
        "checkpoint.save_interval_mins": "checkpoint.save",
        "checkpoint.async_save": "checkpoint.save",
        "checkpoint.on_save_error": "checkpoint.save",
        "checkpoint.overwrite": "checkpoint.save",
        "checkpoint.finetune": "checkpoint.load",
        "checkpoint.load_iteration": "checkpoint.load",
        "checkpoint.use_checkpoint_args": "checkpoint.load",
    }
    for name, other in needs.items():
        if c.given(name) and c[other] is None and other not in c.bad:
            yield Problem(c.flag_text(name), f"needs `{by_name()[other].flag}`")


def saving(c: Case) -> Iterator[Problem]:
    """A run says how often it saves."""
    intervals = ("checkpoint.save_interval", "checkpoint.save_interval_mins")
    if c.given("checkpoint.save") and all(c[name] is None and name not in c.bad for name in intervals):
        yield Problem(c.flag_text("checkpoint.save"), "needs `--save-interval` or `--save-interval-mins`")


def one_of_two(c: Case) -> Iterator[Problem]:
    """On resume the schedule comes from one place; and a run goes on with what --save holds, or begins anew over it."""
    for pair in (
        ("optim.override_opt_param_scheduler", "optim.use_checkpoint_opt_param_scheduler"),
        ("checkpoint.auto_resume", "checkpoint.overwrite"),
    ):
        if all(c[name] for name in pair):
            yield Problem(c.flag_text(*pair), "exclude each other; give one of them")


def split(c: Case) -> Iterator[Problem]:
    """Up to three shares, not negative, not all zero."""
    try:
        split_shares(c["data.split"])
    except ValueError:
        yield Problem(c.flag_text("data.split"), "is not up to three shares of training, validation and test", "e.g. 969,30,1")


def data_paths(c: Case) -> Iterator[Problem]:
    """Data comes from one set of flags, each PREFIX or WEIGHT PREFIX WEIGHT PREFIX ..., or is made up."""
    own = [n for n in ("data.train_data_path", "data.valid_data_path", "data.test_data_path") if c[n]]
    given = [n for n in ("data.data_path", *own) if c[n]]
    if c["data.mock_data"] and given:
        yield Problem(
            f"`--mock-data` and {c.flag_text(given[0])}", "exclude each other: the samples are made up, or those of files"
        )
    elif c["data.data_path"] and own:
        yield Problem(f"`--data-path` and `{by_name()[own[0]].flag}`", "exclude each other: one mixes, the other does not")
    elif not given and not c["data.mock_data"] and not c.planning:
        yield from missing(c, ["data.data_path"])
    for name in given:
        if fault := blend_fault(c[name]):
            yield Problem(c.flag_text(name), fault)


def blend_fault(words: Sequence[str]) -> str | None:
    """Return what is wrong with the words of a --data-path; None where nothing is."""
    if prefixes(words) is None:
        return "mixes weights and prefixes; several datasets are WEIGHT PREFIX WEIGHT PREFIX ... or PREFIX PREFIX ..."
    if light := [w for w in words[::2] if len(words) > 1 and (weight := as_number(w)) is not None and not 0 < weight < inf]:
        return f"has the weight {light[0]}; weights are greater than 0: leave the dataset out instead"
    return None


def prefixes(words: Sequence[str]) -> list[str] | None:
    """The dataset prefixes of a --data-path; None where it is neither prefixes alone nor a weight before each."""
    weights = [as_number(word) is not None for word in words[::2]]
    if len(words) % 2 or not any(weights):
        return None if len(words) > 1 and any(as_number(word) is not None for word in words) else list(words)
    return list(words[1::2]) if all(weights) else None


def as_number(word: str) -> float | None:
    """The number that a word spells, or None."""
    try:
        return float(word)
    except ValueError:
        return None


TOKENIZER_FILES = {
    "GPT2BPETokenizer": ("tokenizer.vocab_file", "tokenizer.merge_file"),
    "BertWordPieceLowerCase": ("tokenizer.vocab_file",),
    "BertWordPieceCase": ("tokenizer.vocab_file",),
    "SentencePieceTokenizer": ("tokenizer.tokenizer_model",),
    "GPTSentencePieceTokenizer": ("tokenizer.tokenizer_model",),
    "HuggingFaceTokenizer": ("tokenizer.tokenizer_model",),
}


def tokenizer(c: Case) -> Iterator[Problem]:
    """Each tokenizer needs its files, and only NullTokenizer its size."""
    kind = c["tokenizer.tokenizer_type"]
    if kind == "NullTokenizer" and c["tokenizer.vocab_size"] is None and "tokenizer.vocab_size" not in c.bad:
        yield Problem(c.flag_text("tokenizer.tokenizer_type"), "needs `--vocab-size`, the number of ids")
    if c.planning:
        return
    for name in TOKENIZER_FILES.get(kind, ()):
        if c[name] is None:
            yield Problem(c.flag_text("tokenizer.tokenizer_type"), f"needs `{by_name()[name].flag}`")


def no_task(c: Case) -> Iterator[Problem]:
    """Settings of another program."""
    for name in by_name():
        if name == "task.epochs" and c.given(name):
            rule = "belongs to tasks/main.py; say how long with --train-iters, or with --train-samples"
            yield Problem(c.flag_text(name), f"{rule} (an epoch is as many as the data has)")
        elif name.startswith("task.") and c.given(name):
            yield Problem(c.flag_text(name), "belongs to tasks/main.py; leave it out")


COMMON_RULES: tuple[Rule, ...] = (
    required, head_width, query_groups, tensor_split, rotary_width, positions, world_size, global_batch, warm_up,
    learning_rates, weight_decay_growth, companions, one_of_two, tokenizer, *ARCHITECTURE_RULES, *CONTEXT_RULES,
    *OPTIM_RULES, *PIPELINE_RULES, *PRECISION_RULES, *RECOMPUTE_RULES, *SCHEDULE_RULES,
)  # fmt: skip
PRETRAINING_RULES: tuple[Rule, ...] = (
    *COMMON_RULES, required_to_pretrain, ramp_up, step_sizes, some_training, one_unit, saving, split, data_paths, no_task,
)  # fmt: skip


def examine(
    config: RunConfig,
    world: int,
    bad: Collection[str] = (),
    planning: bool = False,
    rules: Sequence[Rule] = PRETRAINING_RULES,
) -> tuple[Case, list[Problem]]:
    """The case that file rules go on with, and the problems of all rules that need no disk.

    bad: `section.field` of values that could not be read, which have been reported. rules: of the kind of run.
    """
    problems = list(out_of_range(config))
    unfit = {name for name, _ in problems} | set(bad)
    for name in unfit:  # back to the default, so that no other rule stumbles over the same mistake
        section, _, key = name.partition(".")
        part = dataclasses.replace(getattr(config, section), **{key: by_name()[name].default})
        config = dataclasses.replace(config, **{section: part})
    dp = data_parallel_size(config.layout, world)
    case = Case(config, resolve(config, world), world, dp, frozenset(unfit), planning)
    return case, [p for _, p in problems] + [p for rule in rules for p in rule(case)]


def check(config: RunConfig, world_size: int = 1) -> list[Problem]:
    """Everything that is wrong with `config` on `world_size` ranks, apart from files; empty when it is legal."""
    return examine(config, world_size)[1]


def remarks(case: Case) -> list[str]:
    """Return what was asked for and has no effect in this combination."""
    typed, resolved = case.typed, case.resolved
    notes = []
    if typed.layout.sequence_parallel and not resolved.layout.sequence_parallel:
        notes.append("--sequence-parallel changes nothing: --tensor-model-parallel-size is 1")
    layout, layers = resolved.layout, resolved.model.num_layers
    virtual, ranks = layout.num_layers_per_virtual_pipeline_stage, layout.pipeline_model_parallel_size
    if virtual is not None and layers is not None and pipeline_chunks(layout, layers) == 1:
        why = f"{layers} layers on {ranks} pipeline ranks are one stage each"
        notes.append(f"--num-layers-per-virtual-pipeline-stage {virtual} changes nothing: {why}")
    if typed.checkpoint.save_interval is not None and typed.checkpoint.save is None:
        notes.append("--save-interval changes nothing: nothing is saved without --save")
    notes += [*split_remarks(typed.layout), *batch_remarks(resolved.batch)]
    return [*notes, *schedule_remarks(typed.optim, resolved.optim), *precision_remarks(typed.precision)]
