"""`--dry-run`: what it prints for a large world, and that it opens every file."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron.checkpoint.save import save
from megatron.cli.dry_run import dry_run, inspect_inputs
from megatron.config.command_line.parse import parse
from megatron.config.command_line.saved import to_json
from megatron.config.compare import MAY_DIFFER
from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig, RunSettings
from megatron.data.indexed import IndexedWriter
from megatron.mesh.mesh import Axis, Mesh
from megatron.parallel.cost import MicroBatchShape
from megatron.parallel.ring import RingAttention
from megatron.pipeline.schedules.schedule import SCHEDULES, Action, Op, Schedule, make_schedule
from megatron.pipeline.schedules.simulate import Costs, simulate
from megatron.plan.memory import StageActivations, peak_memory
from megatron.plan.size import MetaModel
from megatron.plan.stages import StagePlan, plan_stages
from megatron.plan.time import flop_costs

SMALL = shlex.split(
    "--num-layers 2 --hidden-size 16 --num-attention-heads 4 --seq-length 8 --max-position-embeddings 8 "
    "--micro-batch-size 2 --train-iters 10 --lr 1e-3 --dry-run"
)
BIG = shlex.split(
    "--preset gpt-8.3b --seq-length 1024 --micro-batch-size 4 --lr 1e-4 --train-samples 10000000 --global-batch-size 512 "
    "--rampup-batch-size 64 64 1000000 --dry-run --world-size 64 --tensor-model-parallel-size 8 --bf16 --sequence-parallel "
    "--tokenizer-type GPT2BPETokenizer"
)


def output(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert dry_run(parse(argv, program="test"), "test") == 0
    return capsys.readouterr().out


def mistakes(argv: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        inspect_inputs(parse(argv, program="test").config)
    return [str(p) for p in caught.value.problems]


@pytest.fixture
def data(tmp_path: Path) -> str:
    prefix = str(tmp_path / "text_document")
    with IndexedWriter(prefix, np.dtype("<u2")) as writer:
        for _ in range(3):
            writer.add_document(np.arange(50, dtype="<u2"), [50])
        writer.finish()
    return prefix


def test_a_large_run_on_a_laptop(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(BIG, capsys)
    for line in (
        "# 64 ranks: tensor 8 x pipeline 1 x context 1 x data 8",
        "vocabulary: 50257 → 51200, 943 padding rows (GPT-2's, since no tokenizer files are named)",
        "# Parameters: 8,314,143,744 in all, without padding",
        "global batch grows over 1,000,000 samples: 64, 128, 192, 256, 320, 384, ... to 512",
        "global batch 512 = micro-batch 4 x 16 micro-batches x 8 data-parallel ranks",
        "a run also needs --vocab-file and --merge-file",
        "a run also needs --data-path",
        "# Schedule, if FLOPs alone took time, in units of the mean stage's forward pass",
    ):
        assert line in text.splitlines(), line
    assert re.search(r"^1f1b: .*16 micro-batches; .*bubble 0\.0%", text, re.MULTILINE)
    # 1,043,549,184 elements on each rank: 6 bytes of weights, 4 of gradients, 8 of optimizer state for each.
    assert "weights           6,261,295,104  (5.83 GiB)" in text
    assert "gradients         4,174,196,736" in text and "optimizer         8,348,393,472" in text


def test_stages_and_batches_that_flags_say(capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks 0 and 2 with an end of the model each, and a step of the batch size whose fullest is neither first nor last."""
    flags = "--pipeline-model-parallel-size 4 --world-size 4 --num-virtual-stages-per-pipeline-rank 2 "
    flags += "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split --num-layers 6 "
    flags += "--step-batch-size-schedule 0:2,80:8,480:4 --tokenizer-type NullTokenizer --vocab-size 10"
    text = output([*SMALL, *flags.split()], capsys)
    table = re.findall(r"^ +(\d) +(\d) +(none|\d-\d) +(embedding|head|) ", text, re.MULTILINE)
    assert [row[:3] for row in table] == [
        ("0", "0", "none"), ("1", "1", "0-0"), ("2", "2", "1-1"), ("3", "3", "2-2"),
        ("4", "0", "3-3"), ("5", "1", "4-4"), ("6", "2", "5-5"), ("7", "3", "none"),
    ]  # fmt: skip
    for line in (
        "global batch 2 from sample 0 on (0 tokens)",
        "global batch 8 from sample 10 on (80 tokens)",
        "global batch 4 from sample 60 on (480 tokens)",
        "global batch 8 = micro-batch 2 x 4 micro-batches x 1 data-parallel ranks",
        "10 iterations, 50 samples, 400 tokens",  # five of 2, five of 8
    ):
        assert line in text.splitlines(), line


def test_sizes_that_a_run_still_has_before_it(tmp_path: Path) -> None:
    flags = "--step-batch-size-schedule 0:2,80:8 --world-size 2 --tokenizer-type NullTokenizer --vocab-size 10"
    flags += f" --auto-resume --save {tmp_path} --save-interval 5"
    parsed = parse([*SMALL, *flags.split()], program="test")
    with pytest.raises(ConfigError, match="has the sizes 2, not divisible by `--micro-batch-size 2` x 2 data-parallel ranks"):
        inspect_inputs(parsed.config, parsed.world_size)


def pipeline(schedule: str, ranks: int, *more: str) -> tuple[RunConfig, StagePlan, Schedule]:
    """GPT-2 small with a vocabulary of one token, so that its ends weigh nothing; 8 micro-batches of 2 samples of 64."""
    words = (
        "--dry-run --preset gpt2-125m --seq-length 64 --micro-batch-size 2 --global-batch-size 16 --train-iters 10 --lr 1e-3 "
        "--bf16 --tokenizer-type GPT2BPETokenizer "
        f"--world-size {ranks} --pipeline-model-parallel-size {ranks} --pipeline-schedule {schedule}"
    )
    config = parse([*words.split(), *more], program="test", check_disk=False).config
    config = replace(config, model=replace(config.model, vocab_size=1))
    plan = plan_stages(config)
    return config, plan, make_schedule(schedule, ranks, 8, plan.chunks)


LAYER = 64 * 2 * 768 * (34 + 5 * 12 * 64 // 768)  # activation bytes, arXiv 2205.05198, equation 1


@pytest.mark.parametrize(
    ("schedule", "in_flight"),
    [("1f1b", [4, 3, 2, 1]), ("gpipe", [8] * 4), ("zb-h1", [4] * 4), ("zb-h2", [7] * 4)],
)
def test_activations_are_those_of_the_micro_batches_in_flight(schedule: str, in_flight: list[int]) -> None:
    config, plan, made = pipeline(schedule, 4)
    assert [len(part.layers) for part in plan.parts] == [3, 3, 3, 3]
    for rank in (1, 2):  # those without the ends of the model
        assert peak_memory(config, MetaModel.from_config(config), plan, made, rank).activations == in_flight[rank] * 3 * LAYER
    mask = 64 * 2 * 768  # of the dropout after the embedding
    assert peak_memory(config, MetaModel.from_config(config), plan, made, 0).activations == in_flight[0] * (3 * LAYER + mask)


def test_the_memory_of_each_kind_of_recomputation(capsys: pytest.CaptureFixture[str]) -> None:
    start = 2 * 64 * 2 * 768  # the input of a layer, in bf16
    square = 64 * 2 * 5 * 12 * 64
    for flags, layers, passing in (
        ("", LAYER, 0),
        ("--recompute-activations", LAYER - square, square),
        ("--recompute-granularity full --recompute-method uniform", start, LAYER - start),
    ):
        config, plan, made = pipeline("1f1b", 4, *flags.split())
        assert peak_memory(config, MetaModel.from_config(config), plan, made, 1).activations == 3 * 3 * layers + passing, flags
    # Zero bubble: what I made again waits for W as 32 bytes for each feature, in the worst case of one micro-batch in four.
    config, plan, made = pipeline("zb-h1", 4, "--recompute-granularity", "full", "--recompute-method", "uniform")
    assert peak_memory(config, MetaModel.from_config(config), plan, made, 1).activations > 4 * 3 * start + 3 * 16 * start
    words = [*BIG, "--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "36"]
    printed = [re.search(r"activations +([\d,]+)", output(argv, capsys)) for argv in (BIG, words)]
    plain, block = (int(found[1].replace(",", "")) for found in printed if found)
    assert 0.5 < block / plain < 0.6


def test_each_context_parallel_rank_has_its_part_of_the_tokens() -> None:
    more = ["--context-parallel-size", "2", "--world-size", "8"]
    config, plan, made = pipeline("1f1b", 4, *more)
    shape = MicroBatchShape(rows=2, seq=32, hidden=768, element=2)
    ring = RingAttention(Axis("cp", 2, 0, (0, 1))).activation_bytes(shape, heads=12, groups=12, head_dim=64, dropout=0.1)
    assert (passing := ring.transient) > 0
    layer = 32 * 2 * (34 * 768 + 4 * 12)  # no attention weights, but a number for each token and head
    for rank in (1, 2):
        assert (
            peak_memory(config, MetaModel.from_config(config), plan, made, rank).activations == (4 - rank) * 3 * layer + passing
        )

    def transient(seq: int, cp: int) -> int:
        layout = replace(config.layout, context_parallel_size=cp, tensor_model_parallel_size=2)
        run = replace(config, layout=layout, data=replace(config.data, seq_length=seq))
        return StageActivations.from_config(run, MetaModel.from_config(run), plan.parts[1]).transient

    # A rank's share of a sequence decides, not the sequence.
    assert transient(8 * 1024, 8) == transient(2 * 1024, 2) > 0
    assert transient(1024, 1) == 0


@pytest.mark.parametrize(
    ("schedule", "more"), [("interleaved", ["--num-layers-per-virtual-pipeline-stage", "1"]), ("zb-v", []), ("1f1b", [])]
)
def test_stages_of_one_rank_share_its_memory(schedule: str, more: list[str]) -> None:
    config, plan, made = pipeline(schedule, 3, *more)
    (layers,) = {len(part.layers) for part in plan.parts}
    peaks = simulate(made, Costs()).peak_activations
    assert peak_memory(config, MetaModel.from_config(config), plan, made, 1).activations == peaks[1] * layers * LAYER


def test_a_tied_matrix_is_there_once_on_a_rank_and_copied_to_another() -> None:
    layer, ends = 12 * 768**2 + 13 * 768, 1024 * 768 + 2 * 768  # positions, final norm
    matrix = 128 * 768  # one token, padded
    for schedule, copies in (("1f1b", 2), ("zb-v", 1)):
        config, plan, made = pipeline(schedule, 2)
        held = [peak_memory(config, MetaModel.from_config(config), plan, made, rank).gradients // 4 for rank in (0, 1)]
        assert sum(held) == 12 * layer + ends + copies * matrix, schedule
    config, plan, made = pipeline("zb-v", 2)
    # The last stage and its loss are on rank 0, and count there.
    assert len(plan.stages_on(0)) == 2 and plan.parts[plan.stages_on(0)[1]].head
    assert peak_memory(config, MetaModel.from_config(config), plan, made, 0).weights == 6 * held[0]


def test_costs_are_shares_of_the_flops() -> None:
    config, plan, _ = pipeline("zb-h1", 4)
    costs = flop_costs(config, plan)
    core, linear = 4 * 64 * 768, 24 * 768**2
    duration = costs.duration
    assert duration(Action(Op.I, 0, 0)) / duration(Action(Op.F, 0, 5)) == pytest.approx((linear + 2 * core) / (linear + core))
    assert duration(Action(Op.W, 1, 0)) / duration(Action(Op.F, 1, 5)) == pytest.approx(linear / (linear + core))
    assert duration(Action(Op.B, 1, 0)) == pytest.approx(duration(Action(Op.I, 1, 0)) + duration(Action(Op.W, 1, 0)))
    assert sum(duration(Action(Op.F, stage, 0)) for stage in range(4)) == pytest.approx(4)
    assert 1 <= duration(Action(Op.F, 3, 0)) / duration(Action(Op.F, 2, 0)) < 1.001  # one token's logits


def test_the_stage_table_counts_layers_and_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--preset gpt2-125m --seq-length 1024 --micro-batch-size 1 --train-iters 10 --lr 1e-3 --dry-run --world-size 16"
    gpt2 = [*words.split(), *shlex.split("--tokenizer-type GPT2BPETokenizer --tensor-model-parallel-size 2")]
    lines = output([*gpt2, "--pipeline-model-parallel-size", "4", "--global-batch-size", "8"], capsys).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("stage "))
    assert lines[start - 1] == "# Parameters: 124,439,808 in all, without padding"
    # The head is as heavy as 4.5 layers. Of two ranks each has half of a layer, and all of two norms and two biases.
    layer, half = 12 * 768**2 + 13 * 768, (12 * 768**2 + 7 * 768) // 2 + 6 * 768
    layers = [4, 4, 3, 1]
    counts = [n * layer for n in layers]
    counts[0] += (50257 + 1024) * 768
    counts[3] += (50257 + 2) * 768  # the final norm, and a copy of the word embedding
    rows = [line.split() for line in lines[start + 1 : start + 5]]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert [row[1] for row in rows] == ["0-3", "4-7", "8-11", "12-15"]
    assert [row[2] for row in rows] == ["0-3", "4-7", "8-10", "11-11"]
    assert [row[3] for row in (rows[0], rows[3])] == ["embedding", "head"]
    assert [int(row[-3].replace(",", "")) for row in rows] == counts
    assert sum(counts) == 124_439_808 + 50257 * 768
    assert [int(row[-2].replace(",", "")) for row in rows[1:3]] == [4 * half, 3 * half]
    assert [int(row[-1].replace(",", "")) for row in rows[1:3]] == [16 * half, 12 * half]
    assert any(line.startswith("# Memory of the fullest ranks, 0-3, bytes") for line in lines)
    assert any(re.match(r"1f1b: 4 ranks, 4 micro-batches; .*bubble .*, peak activations 4, 3, 2, 1$", line) for line in lines)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_many_stages_stay_readable(schedule: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--preset gpt-8.3b --num-layers 256 --seq-length 1024 --micro-batch-size 1 --train-iters 10 --lr 1e-4 --dry-run"
    more = f"--world-size 64 --pipeline-model-parallel-size 64 --pipeline-schedule {schedule} --global-batch-size 256"
    virtual = ["--num-layers-per-virtual-pipeline-stage", "2"] if schedule == "interleaved" else []
    began = time.process_time()
    text = output([*words.split(), *more.split(), *virtual, "--tokenizer-type", "GPT2BPETokenizer"], capsys)
    assert time.process_time() - began < 10
    lines = text[text.index("# 64 ranks") :].splitlines()
    assert len(lines) < 400 and max(map(len, lines)) <= 160


def test_the_stage_table_counts_a_shared_matrix_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--preset gpt2-125m --seq-length 1024 --micro-batch-size 1 --train-iters 10 --lr 1e-3 --dry-run --world-size 2"
    more = "--tokenizer-type GPT2BPETokenizer --pipeline-model-parallel-size 2 --global-batch-size 4 --pipeline-schedule"
    for schedule, copies in (("zb-v", 0), ("1f1b", 1)):
        lines = output([*words.split(), *more.split(), schedule], capsys).splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("stage "))
        counts = [int(line.split()[-3].replace(",", "")) for line in lines[start + 1 : lines.index("", start)]]
        assert len(counts) == 4 - 2 * copies and sum(counts) == 124_439_808 + copies * 50257 * 768


def test_an_explicit_cut_shows(capsys: pytest.CaptureFixture[str]) -> None:
    more = "--tokenizer-type ByteTokenizer --world-size 3 --pipeline-model-parallel-size 3 --pipeline-stage-layers 0 2 0"
    rows = [line.split() for line in output([*SMALL, *more.split()], capsys).splitlines()]
    assert [row[2] for row in rows if row[:2] in (["0", "0"], ["1", "1"], ["2", "2"])] == ["none", "0-1", "none"]


def test_the_printed_configuration_gives_the_same_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = output(BIG, capsys)
    file = tmp_path / "run.toml"
    file.write_text(text[: text.index("# 64 ranks")])
    assert tomllib.loads(file.read_text())["model"]["ffn-hidden-size"] == 12288
    again = parse(["--config", str(file), "--dry-run", "--world-size", "64"], program="test")
    assert again.config == parse(BIG, program="test").config


def test_files_are_opened(capsys: pytest.CaptureFixture[str], data: str) -> None:
    text = output([*SMALL, "--tokenizer-type", "ByteTokenizer", "--data-path", data], capsys)
    assert f"dataset {data}: 3 documents, 150 tokens" in text
    assert "vocabulary: 257 → 384, 127 padding rows (ByteTokenizer)" in text and "a run also needs" not in text


def test_broken_files_are_mistakes(data: str, tmp_path: Path) -> None:
    Path(data + ".idx").write_bytes(b"not an index")
    (tmp_path / "vocab.json").write_text("no json")
    (tmp_path / "merges.txt").write_text("a b")
    tokenizer = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", f"{tmp_path}/vocab.json"]
    lines = mistakes([*SMALL, *tokenizer, "--merge-file", f"{tmp_path}/merges.txt", "--data-path", data])
    assert len(lines) == 2
    assert lines[0].startswith("`--tokenizer-type GPT2BPETokenizer` cannot be opened: ") and "vocab.json" in lines[0]
    assert lines[1].startswith(f"`--data-path {data}` cannot be opened: {data}.idx")
    assert mistakes([*SMALL, "--tokenizer-type", "SentencePieceTokenizer"]) == [
        "`--tokenizer-type SentencePieceTokenizer` needs `--tokenizer-model`, also to know its size"
    ]


def test_data_of_another_tokenizer_is_a_mistake(data: str) -> None:
    about = {"tokenizer_type": "ByteTokenizer", "tokenizer_digest": "0" * 16, "vocab_size": 300}
    Path(data + ".meta.json").write_text(json.dumps(about))
    (line,) = mistakes([*SMALL, "--tokenizer-type", "ByteTokenizer", "--data-path", data])
    assert "0000000000000000" in line and "300 ids" in line


def test_a_checkpoint_is_opened_and_its_shape_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str) -> None:
    argv = [*SMALL, "--tokenizer-type", "ByteTokenizer", "--data-path", data]
    config = parse(argv, program="test").config
    directory = save(tmp_path, 7, {}, Mesh.single(), config=to_json(config))
    assert f"checkpoint {directory}: complete" in output([*argv, "--load", str(tmp_path)], capsys)
    assert mistakes([*argv, "--load", str(tmp_path), "--swiglu", "--num-layers", "3"]) == [
        f"`--num-layers 3` does not fit {directory}, which was made with 2; legal: 2; --use-checkpoint-args takes them all",
        f"`--activation swiglu` does not fit {directory}, which was made with gelu; "
        "legal: gelu; --use-checkpoint-args takes them all",
    ]
    assert mistakes([*argv, "--load", str(tmp_path), "--disable-bias-linear"]) == [
        f"`--disable-bias-linear` is given, and {directory} was made without it; "
        "legal: without it; --use-checkpoint-args takes them all",
    ]
    (directory / "manifest.json").write_text("torn")
    (line,) = mistakes([*argv, "--load", str(tmp_path)])
    assert line.startswith(f"`--load {tmp_path}` cannot be loaded: ") and "manifest.json" in line


def test_what_a_loading_run_may_choose_is_made_of_model_fields() -> None:
    assert set(MAY_DIFFER) < set(to_json(RunSettings())["model"])


def test_mistakes_are_found_before_torch_is_imported(data: str) -> None:
    """Sizes are read from the model, which takes torch; what is wrong with a command or its files is said before."""
    program = (
        "import sys\nfrom megatron.cli.program import pretrain\nstatus = None\n"
        "try:\n    status = pretrain(sys.argv[1:], program='p', defaults={})\n"
        "except SystemExit as end:\n    status = end.code\n"
        "print('torch' in sys.modules, file=sys.stderr)\nsys.exit(status)"
    )
    argv = [sys.executable, "-c", program, *SMALL, "--tokenizer-type", "ByteTokenizer", "--data-path", data]

    def ended(*more: str) -> tuple[int, str, str]:
        done = subprocess.run([*argv, *more], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    status, out, err = ended()
    assert status == 0 and "# Parameters: " in out and err.endswith("True\n")
    status, out, err = ended("--num-attention-heads", "3")
    assert (status, out) == (2, "") and "--num-attention-heads 3" in err and err.endswith("False\n")
    Path(data + ".bin").write_bytes(b"cut")
    status, out, err = ended()
    assert (status, out) == (2, "") and "truncated" in err and "Traceback" not in err and err.endswith("False\n")
