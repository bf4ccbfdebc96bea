"""Settings that --use-checkpoint-args takes from a checkpoint beyond the model's shape."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron.config.command_line.parse import Parsed, parse
from megatron.config.command_line.saved import to_json
from megatron.config.errors import ConfigError
from megatron.config.schema import DataConfig, ModelSettings, RunSettings, TokenizerConfig

MODEL = ModelSettings(num_layers=1, hidden_size=8, num_attention_heads=1, max_position_embeddings=64)
HELD = TokenizerConfig("GPT2BPETokenizer", vocab_file="held/vocab.json", merge_file="held/merges.txt", eod_token="7")


def run(folder: Path, *flags: str, length: int | None = 32, tokenizer: TokenizerConfig = HELD, task: bool = False) -> Parsed:
    def saved(_: object) -> dict[str, Any]:
        return to_json(RunSettings(model=MODEL, data=DataConfig(seq_length=length), tokenizer=tokenizer))

    (folder / "manifest.json").write_text("{}")
    argv = shlex.split(f"--micro-batch-size 1 --train-iters 1 --lr 1 --data-path d --load {folder} --use-checkpoint-args")
    return parse([*argv, *flags], program="t", read_saved=saved, check_disk=False, task=task)


def test_length_and_tokenizer(tmp_path: Path) -> None:
    parsed = run(tmp_path)
    assert parsed.config.data.seq_length == 32 and parsed.config.tokenizer == HELD
    words = "from the checkpoint, by --use-checkpoint-args: --seq-length 32, --tokenizer-type GPT2BPETokenizer"
    assert words in parsed.notes
    assert run(tmp_path, length=None).config.data.seq_length == 64  # an import knows the model alone


def test_a_flag_wins(tmp_path: Path) -> None:
    """A tokenizer comes whole from one place; which token ends a document may be said of the checkpoint's."""
    assert run(tmp_path, "--seq-length", "16").config.data.seq_length == 16
    assert run(tmp_path, "--tokenizer-type", "ByteTokenizer").config.tokenizer == TokenizerConfig("ByteTokenizer")
    other = run(tmp_path, "--eod-token", "9").config.tokenizer
    assert (other.tokenizer_type, other.eod_token) == ("GPT2BPETokenizer", "9")
    with pytest.raises(ConfigError, match="--tokenizer-type"):
        run(tmp_path, tokenizer=TokenizerConfig())
