"""Flags that are no field: every one of Megatron-LM's is known, whole command lines of it, and what others type."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from megatron.config.command_line.arguments import read_arguments
from megatron.config.command_line.help import help_text
from megatron.config.command_line.other_flags.other_frameworks import ADVICE, MESSAGES, NAMES
from megatron.config.command_line.other_flags.refused import FEATURES, REFUSED_VALUES
from megatron.config.command_line.other_flags.table import OtherFlag, find_other, other_flags
from megatron.config.command_line.parse import Parsed, parse
from megatron.config.command_line.reading import Reading
from megatron.config.command_line.spelling import normalize_flag, spellings
from megatron.config.errors import ConfigError

HERE = Path(__file__).parent
BASE = shlex.split(
    "--num-layers 2 --hidden-size 16 --num-attention-heads 4 --seq-length 8 --max-position-embeddings 8 "
    "--micro-batch-size 2 --train-iters 10 --lr 1e-3 --tokenizer-type ByteTokenizer --data-path data"
)


@cache
def megatron_flags() -> dict[str, str]:
    """Every flag of Megatron-LM -> the releases that have it."""
    found: dict[str, str] = {}
    for part in re.split(r"\n\n", (HERE / "megatron_flags.txt").read_text())[1:]:
        releases, *names = part.replace("\n", " ").split(" --")
        found |= {"--" + name.strip(): releases for name in names}
    return found


@cache
def command_lines() -> tuple[tuple[str, int, int, tuple[str, ...]], ...]:
    """Program, world size, how many of them, and words of each command line."""
    flags: dict[str, dict[str, list[str]]] = {}
    found = []
    for text in re.split(r"\n(?=\d)", (HERE / "megatron_command_lines.txt").read_text())[1:]:
        head, words = " ".join(text.split()).split(":", 1)
        number, program, world, times, *parent = head.split()
        added, _, gone = words.partition(" without ")
        own = dict(flags[parent[1]]) if parent else {}
        for name in gone.split():
            del own[name]
        for word in shlex.split(added):
            if re.match(r"--[a-zA-Z]", word):
                last = own[word] = []
            else:
                last.append(word)
        flags[number] = own
        found.append((program, int(world), int(times[1:]), tuple(w for name, after in own.items() for w in (name, *after))))
    return tuple(found)


def parse_with(*extra: str) -> Parsed:
    return parse([*BASE, *extra], program="test", check_disk=False)


def mistakes(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(list(argv), program="test", check_disk=False)
    return [str(p) for p in caught.value.problems]


def test_every_flag_of_megatron_is_known_by_its_full_name() -> None:
    names = megatron_flags()
    assert len(names) > 900 and sum("23.06" in r for r in names.values()) == 223
    unknown = [name for name in names if normalize_flag(name) not in spellings() and find_other(normalize_flag(name)) is None]
    assert unknown == []
    for name in names:
        reading = read_arguments([name])
        assert not any("is read as" in note for note in reading.notes) or find_other(normalize_flag(name)), name
        assert not any("not a known flag" in str(p) or "could be" in str(p) for p in reading.problems), name


def test_no_flag_is_both_in_the_schema_and_in_the_tables() -> None:
    both = [flag for flag in spellings() if find_other(flag) is not None]
    assert not both, f"these flags have a field now: take them out of config/command_line/other_flags: {both}"


def read_flag(row: OtherFlag, *values: str) -> Reading:
    return read_arguments([row.flag.replace("*", "x"), *values])


@pytest.mark.parametrize("kind", ["without effect", "refused", "renamed"])
def test_each_other_flag_has_one_line(kind: str) -> None:
    for row in other_flags().values():
        if (row.refused, bool(row.means)) != {"without effect": (False, False), "refused": (True, False)}.get(
            kind, (False, True)
        ):
            continue
        name = row.flag.replace("*", "x")
        if kind == "renamed":
            reading = read_flag(row, *["block" if "method" in name else "1"] * (row.takes == "1"))
            assert reading.problems == [] and reading.values and len(reading.notes) == 1, name
            assert f"{name}" in reading.notes[0] and f"is read as {row.means[0]}" in reading.notes[0]
            continue
        harmless = {"0": [], "1": ["1"], "*": ["1", "2"]}[row.takes] if not row.legal else [row.legal[-1]]
        if kind == "without effect" or row.legal:
            reading = read_flag(row, *harmless)
            assert (reading.problems, reading.values) == ([], {}), name
            assert len(reading.notes) == 1 and f"{name} " in reading.notes[0] and "changes nothing: " in reading.notes[0]
        if kind == "refused" or row.legal:
            reading = read_flag(row, "strange")
            assert (len(reading.problems), reading.notes, reading.values) == (1, [], {}), name
            assert row.text in str(reading.problems[0])


def test_what_would_change_a_result_is_never_without_effect() -> None:
    for words in (
        "--fp8-format hybrid", "--fp8-format=e4m3", "--fp4-format e2m1", "--num-experts 8", "--expert-model-parallel-size 2",
        "--moe-router-topk 2", "--moe-anything-new 1", "--qk-layernorm", "--qk-l2-norm", "--multi-latent-attention",
        "--mtp-num-layers 1", "--use-rope-scaling", "--rotary-scaling-factor 2.0", "--rope-type yarn",
        "--window-size 128,0", "--softmax-type learnable", "--quick-geglu", "--add-qkv-bias", "--sft",
        "--use-torch-fsdp2", "--data-parallel-sharding-strategy optim_grads_params", "--main-grads-dtype bf16",
        "--exp-avg-dtype fp8", "--transformer-impl inference_optimized", "--spec my_module my_spec", "--ckpt-format nemo",
        "--mid-level-dataset-surplus 0.1", "--freeze-all-layers", "--perform-rl-step", "--fim-data",
        "--embedding-init-method-std 1", "--optimizer-cpu-offload", "--recompute-modules core_attn mlp",
        "--error-injection-rate 5", "--rerun-mode report_stats",
    ):  # fmt: skip
        reading = read_arguments(words.split())
        assert len(reading.problems) == 1 and reading.notes == [], words
        assert "not a known flag" not in str(reading.problems[0]), words


def test_a_switch_that_asks_for_nothing_is_no_mistake() -> None:
    for words in (
        "--expert-model-parallel-size 1", "--mtp-num-layers 0", "--rotary-scaling-factor 1.0", "--softmax-type vanilla",
        "--data-parallel-sharding-strategy no_shard", "--recompute-modules core_attn", "--rope-type rope",
    ):  # fmt: skip
        (note,) = parse_with(*words.split()).notes
        assert note == f"{words} changes nothing: it turns on nothing that is unavailable"


def test_a_feature_is_refused_in_one_message() -> None:
    assert mistakes(*BASE, "--num-experts", "8", "--moe-router-topk", "2", "--fp8-format", "hybrid") == [
        "`--num-experts` and `--moe-router-topk` belong to mixtures of experts, which are not available yet",
        "`--fp8-format` belongs to FP8 and FP4, which are not available yet; use --bf16",
    ]
    assert mistakes(*BASE, "--profile") == [
        "`--profile` belongs to profiling by nsys or torch, which is not available; --profile-pipeline measures the pipeline"
    ]
    for flag, words in REFUSED_VALUES.items():
        for value, rule in words.items():
            assert mistakes(*BASE, flag, value)[0].startswith(f"`{flag} {value}` {rule}")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--batch-size 4", "--micro-batch-size 4"),
        ("--warmup 0.1", "--lr-warmup-fraction 0.1"),
        ("--model-parallel-size 1", "--tensor-model-parallel-size 1"),
        ("--checkpoint-activations", "--recompute-granularity full --recompute-method uniform"),
        ("--checkpoint-activations --checkpoint-num-layers 2", "--recompute-granularity full --recompute-method uniform "
         "--recompute-num-layers 2"),
        ("--activations-checkpoint-method block", "--recompute-granularity full --recompute-method block"),
        ("--checkpoint-activations --activations-checkpoint-num-layers 2", "--recompute-granularity full --recompute-method "
         "uniform --recompute-num-layers 2"),
        ("--save x --persistent-save-interval 5 --save-retain-interval 10", "--save x --save-interval 5 --keep-every 10 "
         "--keep-last 1"),
    ],
)  # fmt: skip
def test_old_flags_are_read_as_the_new_ones(old: str, new: str) -> None:
    base = shlex.split(" ".join(BASE).replace(" --micro-batch-size 2", "")) if old.startswith("--batch-size") else BASE
    parsed = parse([*base, *old.split()], program="t", check_disk=False)
    assert (
        parsed.config == parse([*base, *new.split()], program="t", check_disk=False).config != parse_with().config
        or "model-par" in old
    )
    assert len(parsed.notes) == len([word for word in old.split() if word.startswith("--") and word != "--save"])


def test_an_old_flag_that_contradicts_a_new_one() -> None:
    assert mistakes(*BASE, "--batch-size", "4") == [
        "`--micro-batch-size` and `--batch-size` set the same thing to different values"
    ]
    assert mistakes(*BASE, "--batch-size", "x")[0] == "`--batch-size x` is not an integer"
    assert mistakes(*BASE, "--batch-size")[0] == "`--batch-size` needs a value after it"


def test_no_position_embedding_gives_way_to_other_flags() -> None:
    for words, meaning in {
        "--use-rotary-position-embeddings --no-position-embedding": "rope",
        "--no-position-embedding --use-rotary-position-embeddings": "rope",
        "--no-position-embedding --position-embedding-type rope": "rope",
        "--no-position-embedding": "none",
        "--position-embedding-type none --no-position-embedding": "none",
        "--preset llama-7b --no-position-embedding": "rope",
        "--preset gpt2-125m --no-position-embedding": "none",
    }.items():
        assert parse_with(*words.split()).config.model.position_embedding_type == meaning, words
    assert mistakes(*BASE, "--no-position-embedding", "--position-embedding-type", "learned_absolute") == [
        "`--position-embedding-type` and `--no-position-embedding` set the same thing to different values"
    ]
    groups = {"--group-query-attention --num-query-groups 2": 2, "--num-query-groups 4 --group-query-attention": 4}
    for words, size in {**groups, "--group-query-attention": 1, "": 4}.items():
        assert parse_with(*words.split()).config.model.num_query_groups == size, words


def test_flags_that_give_way_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[model]\nuse-rotary-position-embeddings = true\nno-position-embedding = true\nnum-query-groups = 2\n")
    model = parse_with("--config", str(file), "--group-query-attention").config.model
    assert (model.position_embedding_type, model.num_query_groups) == ("rope", 2)


def test_other_flags_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[batch]\nbatch-size = 3\n[checkpoint]\nckpt-format = 'zarr'\nrecompute-modules = ['core_attn']\n")
    without = shlex.split(" ".join(BASE).replace(" --micro-batch-size 2", ""))
    parsed = parse([*without, "--config", str(file)], program="t", check_disk=False)
    assert parsed.config.batch.micro_batch_size == 3
    assert parsed.notes[0] == f"batch-size 3 in {file} is read as --micro-batch-size 3"
    assert parsed.notes[1].startswith(f"ckpt-format zarr in {file} changes nothing: ") and len(parsed.notes) == 3
    file.write_text("[batch]\nbatch-size = 'x'\nlearning-rate = 3\nn_layer = 3\nnum-experts = 3\n")
    assert mistakes(*BASE, "--config", str(file)) == [
        "`batch-size x` is not an integer",
        f"`learning-rate` under [batch] in {file} is called --lr here",
        f"`n_layer` under [batch] in {file} is called --num-layers here",
        f"`num-experts in {file}` belongs to mixtures of experts, which are not available yet",
    ]


def test_values_as_scripts_and_yaml_files_hold_them() -> None:
    for split in ("'99,1,0'", '"99,1,0"', "[99, 1, 0]", "99/1/0"):
        assert parse_with("--split", split).config.data.split == split
    ramp = ["--rampup-batch-size", "[2", "2", "100]", "--global-batch-size", "8", "--train-samples", "1000"]
    without = shlex.split(" ".join(BASE).replace(" --train-iters 10", ""))
    for words in (ramp, ["--rampup-batch-size", "[2 2 100]", *ramp[4:]], ["--rampup-batch-size", "[2, 2, 100]", *ramp[4:]]):
        assert parse([*without, *words], program="t", check_disk=False).config.batch.rampup_batch_size == (2, 2, 100)


def test_command_lines_of_megatron_are_legal_or_refused_for_a_feature() -> None:
    legal, refused = 0, 0
    for program, world, times, argv in command_lines():
        own = {"pretrain_bert.py": ("bert", "BertWordPieceLowerCase"), "pretrain_gpt.py": ("gpt", "GPT2BPETokenizer")}[program]
        defaults = dict(zip(("model.architecture", "tokenizer.tokenizer_type"), own, strict=True))
        words = [*argv, "--dry-run", "--world-size", str(world)]
        try:
            parse(words, program=program, defaults=defaults, check_disk=False)
            legal += times
        except ConfigError as error:
            text = str(error)
            illegal = "--global-batch-size 2`" in text  # two are no samples for 8 ranks, there as here
            assert "not available" in text or "tools/generate.py" in text or illegal, text
            assert "not a known flag" not in text and "belongs to no flag" not in text, text
            refused += times
    assert (legal + refused, legal >= 100) == (140, True), (legal, refused)


def test_what_people_of_other_frameworks_type() -> None:
    flags = {flag for names in NAMES for flag in re.findall(r"--[a-z0-9-]+", names)}
    flags |= {flag for answer in ADVICE for flag in re.findall(r"--[a-z0-9-]+", answer)} - {"--nproc"}
    assert [flag for flag in flags if normalize_flag(flag) not in spellings()] == []
    taken = [name for name in MESSAGES if "--" + name in spellings() or find_other("--" + name)]
    assert not taken, f"these are known already: {taken}"
    written = sum(len(names.split()) for names in [*NAMES.values(), *ADVICE.values()])
    assert len(MESSAGES) == written, "a name stands twice"


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("--tp", "is called --tensor-model-parallel-size here"),
        ("-tp", "is called --tensor-model-parallel-size here"),
        ("--pp", "is called --pipeline-model-parallel-size here"),
        ("--learning-rate", "is called --lr here"),
        ("--learning_rate", "is called --lr here"),
        ("--output_dir", "is called --save here"),
        ("--out_dir", "is called --save here"),
        ("--per_device_train_batch_size", "is called --micro-batch-size here"),
        ("--block_size", "is called --seq-length here"),
        ("--n_layer", "is called --num-layers here"),
        ("--n_embd", "is called --hidden-size here"),
        ("--max_steps", "is called --train-iters here"),
        ("--max_iters", "is called --train-iters here"),
        ("--warmup_steps", "is called --lr-warmup-iters here"),
        ("--gradient_checkpointing", "is called --recompute-activations, or --recompute-granularity full"),
        ("--max_grad_norm", "is called --clip-grad here"),
        ("--resume_from_checkpoint", "is called --auto-resume here"),
        ("--training.steps", "is called --train-iters here"),
        ("--training.local_batch_size", "is called --micro-batch-size here"),
        ("--training.seq_len", "is called --seq-length here"),
        ("--parallelism.tensor_parallel_degree", "is called --tensor-model-parallel-size here"),
        ("--parallelism.data_parallel_shard_degree", "is not a flag: data parallelism takes the ranks"),
        ("--optimizer.lr", "is called --lr here"),
        ("--train.global_batch_size", "is called --global-batch-size here"),
        ("--train.max_tokens", "is not a flag: set the length of training with --train-iters"),
        ("--eval.interval", "is called --eval-interval here"),
        ("--checkpoint.interval", "is called --save-interval here"),
        ("--gradient-accumulation-steps", "is not a flag: gradients are accumulated over --global-batch-size /"),
        ("--num_train_epochs", "is not a flag: set the length of training with --train-iters, or with --train-samples (one"),
        ("--train_micro_batch_size_per_gpu", "is called --micro-batch-size here"),
        ("--deepspeed_config", "is not a flag: --use-distributed-optimizer shards the optimizer state"),
        ("--model_name_or_path", "is not a flag: --preset gives the sizes of a known model, and tools/import_hf.py"),
        ("--device", "is not a flag: each process uses its GPU"),
        ("--dtype", "is not a flag: the model computes in fp32"),
    ],
)  # fmt: skip
def test_what_others_type_is_answered_in_words(typed: str, answer: str) -> None:
    (line,) = mistakes(*BASE, typed, "4")
    assert line.startswith(f"`{typed}` {answer}")


def test_one_cause_is_one_message(tmp_path: Path) -> None:
    base = " ".join(BASE)
    for theirs, ours in {
        "--learning_rate 1e-3": "--lr 1e-3", "--max_steps 10": "--train-iters 10", "--epochs 3": "--train-iters 10",
        "--num_epochs 3": "--train-iters 10", "--hiden-size 16": "--hidden-size 16",
    }.items():  # fmt: skip
        assert len(mistakes(*base.replace(ours, theirs).split())) == 1, theirs
    assert len(mistakes(*base.replace("--lr 1e-3", "").split(), "--max_steps", "5")) == 2
    file = tmp_path / "run.toml"
    for key in ("num_layer", "n_layer"):
        file.write_text(f"[model]\n{key} = 2\n")
        assert len(mistakes(*base.replace("--num-layers 2", "").split(), "--config", str(file))) == 1, key


def test_a_suggestion_is_near_or_there_is_none() -> None:
    for typed, hint in {
        "--hiden-size": "did you mean --hidden-size?", "--nmu-workers": "did you mean --num-workers?",
        "--train-iter-s": "did you mean --train-iters?", "--sequence-paralel": "did you mean --sequence-parallel?",
        "--unheard": "--help lists all", "--no-such-thing": "--help lists all", "--frobnicate-layers": "--help lists all",
    }.items():  # fmt: skip
        assert mistakes(*BASE, f"{typed}=4") == [f"`{typed}` is not a known flag; {hint}"]


def test_help_says_what_becomes_of_other_flags() -> None:
    text = help_text("pretrain_gpt.py")
    for row in other_flags().values():
        assert row.refused or row.flag in text
        assert not row.means or re.search(rf"{row.flag} +{' '.join(row.means)}\n", text)
    assert "--group-query-attention means 1 unless another is given" in text.replace("\n" + " " * 38, " ")
    assert len({flag for flags in FEATURES.values() for flag in flags.split()}) > 200
