"""pretrain_bert.py as a user runs it, in one process: what it prints and writes, how it resumes, how it refuses."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from texts import pages
from tokenizers import BertWordPieceTokenizer

from megatron.cli.program import pretrain
from megatron.interop.checked_export import export_hf
from megatron.train.ending import Exit

ROOT = Path(__file__).parents[2]
KEYS = {
    "iteration", "lm_loss", "sop_loss", "grad_norm", "learning_rate", "loss_scale", "skipped_iterations", "nan_iterations",
    "consumed_samples", "consumed_tokens", "iteration_time_ms", "tokens_per_second", "tflops_per_gpu", "mfu", "mfu_causal",
    "peak_memory_bytes",
}  # fmt: skip
TIMES = ("iteration_time_ms", "tokens_per_second", "tflops_per_gpu", "mfu", "mfu_causal")
SMALL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 48 --max-position-embeddings 48 "
    "--micro-batch-size 4 --global-batch-size 8 --train-iters 12 --lr 1e-2 --lr-warmup-iters 2 "
    "--split 80,10,10 --log-interval 1 --eval-interval 5 --eval-iters 2 --save-interval 4"
)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A vocabulary, and pages of a manual in sentences, made with the tools."""
    folder = tmp_path_factory.mktemp("bert")
    texts = [re.sub(r"[*`_=|+~^-]{2,}|\s+", " ", text) for text in pages(80, 2000)]
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = BertWordPieceTokenizer(lowercase=True)
    words.train_from_iterator(texts, vocab_size=600, show_progress=False)
    words.save_model(str(folder))
    command = [os.environ["WARM_PYTHON"]]
    command += [ROOT / "tools" / "preprocess_data.py", "--input", folder / "c.jsonl", "--split-sentences"]
    command += ["--output-prefix", folder / "c", "--tokenizer-type", "BertWordPieceLowerCase", "--workers", "1"]
    subprocess.run(list(map(str, [*command, "--vocab-file", folder / "vocab.txt"])), check=True, capture_output=True)
    return folder


@pytest.fixture
def flags(sentences, tmp_path):
    data = ["--vocab-file", str(sentences / "vocab.txt"), "--data-path", str(sentences / "c_text_sentence")]
    return [*SMALL.split(), *data, "--save", str(tmp_path / "run")]


def run(flags, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["pretrain_bert.py", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "pretrain_bert.py"), run_name="__main__")
    return int(end.value.code or 0)


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def test_a_bert_run_trains_and_is_exported(flags, tmp_path, monkeypatch, capsys):
    assert run([*flags, "--tensorboard-dir", tmp_path / "tb"], monkeypatch) == Exit.FINISHED
    out = capsys.readouterr().out
    assert len(re.findall(r"\| lm loss: [\d.E+-]+ \| sop loss: [\d.E+-]+ \| loss scale: 1\.0 \| grad norm", out)) == 12
    values = r"lm loss value: [\d.E+-]+ \| lm loss PPL: [\d.E+-]+ \| sop loss value: [\d.E+-]+ \| "
    assert re.search(rf" validation loss at iteration 5 \| {values}", out)
    training = [line for line in metrics(tmp_path / "run") if "split" not in line]
    assert all(set(line) == KEYS - set(TIMES) for line in training)
    assert training[-1]["lm_loss"] < 0.95 * training[0]["lm_loss"] and 0.3 < training[-1]["sop_loss"] < 1.5
    held_out = [line for line in metrics(tmp_path / "run") if "split" in line]
    assert [line["split"] for line in held_out] == ["validation"] * 3 + ["test"]
    assert all(set(line) == {"iteration", "split", "lm_loss", "ppl", "sop_loss"} for line in held_out)
    said = []
    export_hf(tmp_path / "run", tmp_path / "hf", say=said.append)
    assert any("logits differ by at most" in line for line in said)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tags = {"lm loss", "sop loss", "sop loss vs samples", "lm loss validation", "sop loss validation"}
    assert tags <= set(events.Tags()["scalars"])


def test_a_resumed_run_is_the_uninterrupted_run(flags, tmp_path, monkeypatch):
    assert run(flags, monkeypatch) == Exit.FINISHED
    split = [flag if flag != str(tmp_path / "run") else str(tmp_path / "split") for flag in flags]
    assert run([*split, "--auto-resume", "--exit-interval", "7"], monkeypatch) == Exit.STOPPED
    assert run([*split, "--auto-resume"], monkeypatch) == Exit.FINISHED
    assert metrics(tmp_path / "split") == metrics(tmp_path / "run")
    final, expected = (load_file(tmp_path / n / "iter_0000012" / "shard_00000.safetensors") for n in ("split", "run"))
    assert final.keys() == expected.keys() and all(torch.equal(final[name], expected[name]) for name in final)


def test_without_binary_head_there_is_one_loss(flags, tmp_path, monkeypatch, capsys):
    assert run([*flags, "--bert-no-binary-head", "--train-iters", "3"], monkeypatch) == Exit.FINISHED
    assert "sop" not in capsys.readouterr().out
    assert all("sop_loss" not in line for line in metrics(tmp_path / "run"))


def test_a_skipped_step_has_no_losses(flags, tmp_path, monkeypatch):
    """Null, but the key is there."""
    assert run([*flags, "--skip-train-iterations", "3", "--exit-interval", "4"], monkeypatch) == Exit.STOPPED
    lines = [line for line in metrics(tmp_path / "run") if "split" not in line]
    assert (
        [line["sop_loss"] is None for line in lines]
        == [line["lm_loss"] is None for line in lines]
        == [False, False, True, False]
    )


def test_a_dry_run(flags, monkeypatch, capsys):
    wide = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--world-size", "8", "--dry-run"]
    assert run([*flags, *wide], monkeypatch) == 0
    out = capsys.readouterr().out
    # 2 layers of 12 h^2 + 13 h; words, positions, types; final norm; dense, norm and bias; pooler; order
    h, vocab = 32, len(Path(flags[flags.index("--vocab-file") + 1]).read_text().split("\n")) - 1 + 2
    count = 2 * (12 * h * h + 13 * h) + (vocab + 48 + 2) * h + 2 * h + (h * h + h + 2 * h + vocab) + (h * h + h) + (2 * h + 2)
    assert f"{count:,}" in out


def test_gpt_settings_and_wrong_checkpoints_are_refused(flags, sentences, tmp_path, monkeypatch, capsys):
    assert run([*flags, "--reset-position-ids", "--seq-length", "4"], monkeypatch) == 2
    err = capsys.readouterr().err
    assert "belongs to GPT (pretrain_gpt.py)" in err and "too short for [CLS]" in err
    assert run([*flags, "--tokenizer-type", "ByteTokenizer"], monkeypatch) == 2
    assert "ByteTokenizer" in capsys.readouterr().err
    assert run([*flags, "--exit-interval", "4"], monkeypatch) == Exit.STOPPED
    other = [flag if flag != str(tmp_path / "run") else str(tmp_path / "gpt") for flag in flags]
    defaults = {"tokenizer.tokenizer_type": "BertWordPieceLowerCase"}
    assert pretrain([*other, "--load", str(tmp_path / "run")], program="pretrain_gpt.py", defaults=defaults) == 2
    assert "a GPT cannot start from" in capsys.readouterr().err
