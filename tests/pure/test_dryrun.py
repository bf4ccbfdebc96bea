"""`--dry-run`: what it prints for a large world, and that it opens every file."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from megatron.checkpoint.save import save
from megatron.config.cli import parse, to_json
from megatron.config.compare import FREE
from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig
from megatron.data.indexed import IndexedWriter
from megatron.dryrun import dry_run, inspect
from megatron.mesh.mesh import Mesh

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
        inspect(parse(argv, program="test").config)
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
        "stage 0 | F0 B0 F1 B1",
    ):
        assert line in text.splitlines(), line
    # 1,043,549,184 elements on each rank: 6 bytes of weights, 4 of gradients, 8 of optimizer state for each.
    assert "weights           6,261,295,104  (5.83 GiB)" in text
    assert "gradients         4,174,196,736" in text and "optimizer         8,348,393,472" in text


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
    (directory / "manifest.json").write_text("torn")
    (line,) = mistakes([*argv, "--load", str(tmp_path)])
    assert line.startswith(f"`--load {tmp_path}` cannot be loaded: ") and "manifest.json" in line


def test_what_a_loading_run_may_choose_is_made_of_model_fields() -> None:
    assert set(FREE) < set(to_json(RunConfig())["model"])


def test_the_process_needs_no_torch_and_exits_with_2_on_mistakes(data: str) -> None:
    program = (
        "import sys\nfrom megatron.train.program import pretrain\n"
        "status = pretrain(sys.argv[1:], program='p', defaults={})\nsys.exit(77 if 'torch' in sys.modules else status)"
    )
    argv = [sys.executable, "-c", program, *SMALL, "--tokenizer-type", "ByteTokenizer", "--data-path", data]
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 0
    Path(data + ".bin").write_bytes(b"cut")
    broken = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert broken.returncode == 2 and "truncated" in broken.stderr and "Traceback" not in broken.stderr
    assert broken.stdout == ""
