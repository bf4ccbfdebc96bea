"""Data of another tokenizer, without a sidecar that says so: status 2, and the place, before training or when it is met."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.cli.program import pretrain
from megatron.data import matching
from megatron.data.indexed import IndexedWriter

FLAGS = """--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 16 --max-position-embeddings 16 --lr 1e-3
--micro-batch-size 1 --global-batch-size 1 --train-iters 2 --eval-iters 0 --split 1,0,0 --tokenizer-type ByteTokenizer"""


@pytest.mark.parametrize("when", ["opened", "met"])
def test_a_token_beyond_the_vocabulary_is_refused(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with IndexedWriter(str(tmp_path / "bad"), np.dtype("<u2")) as writer:
        writer.add_document(np.arange(250, 280), [30])
        writer.finish()
    if when == "met":
        monkeypatch.setattr(matching, "_piece_starts", lambda tokens: iter(()))
    argv = [*FLAGS.split(), "--data-path", str(tmp_path / "bad")]
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *argv])
    assert pretrain(argv, program="pretrain_gpt.py", defaults={}) == 2
    err = capsys.readouterr().err
    assert "bad.bin, document 0, token 7: id 257 is outside of the vocabulary of 257 ids" in err
    assert "Traceback" not in err and len(err.splitlines()) == 1
