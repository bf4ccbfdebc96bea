"""The scripts of examples/megatron_lm: small models run through each to its end, and its own sizes are legal for its ranks."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import PYTHON, ROOT, run

FOLDER = ROOT / "examples" / "megatron_lm"
SIZES = {  # ranks, and the samples of a step, that each script has on 8 GPUs, or on the only one
    "pretrain_gpt.sh": ("1 ranks: tensor 1 x pipeline 1", "8 = micro-batch 4 x 2 micro-batches x 1"),
    "pretrain_gpt_distributed.sh": ("8 ranks: tensor 1 x pipeline 1", "64 = micro-batch 8 x 1 micro-batches x 8"),
    "pretrain_gpt_distributed_with_mp.sh": ("8 ranks: tensor 2 x pipeline 2", "16 = micro-batch 4 x 2 micro-batches x 2"),
    "pretrain_bert.sh": ("1 ranks: tensor 1 x pipeline 1", "8 = micro-batch 4 x 2 micro-batches x 1"),
    "pretrain_bert_distributed.sh": ("8 ranks: tensor 1 x pipeline 1", "32 = micro-batch 4 x 1 micro-batches x 8"),
    "pretrain_bert_distributed_with_mp.sh": ("8 ranks: tensor 2 x pipeline 2", "16 = micro-batch 2 x 4 micro-batches x 2"),
}
LAYER = 12 * 1024**2 + 13 * 1024  # its parameters
PARAMETERS = {  # by the model's name: 24 layers, vocabulary and positions, the last norm; BERT's types, heads and pooler
    "gpt": lambda vocab: 24 * LAYER + (vocab + 1024) * 1024 + 2 * 1024,
    "bert": lambda vocab: (
        24 * LAYER + (vocab + 512 + 2) * 1024 + 2 * 1024 + (1024**2 + 3 * 1024 + vocab) + (1024**2 + 1024) + 2050
    ),
}
TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1 "
    "--global-batch-size 4 --train-iters 2 --lr-decay-iters 2 --initial-loss-scale 256 --split 8,1,1 --log-interval 1 "
    "--eval-iters 1 --save-interval 2"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """By the model's name, what stands before SAVE in the arguments of a script."""
    folder = tmp_path_factory.mktemp("data")
    text = [json.dumps({"text": f"{i} green bottles, hanging on the wall. " * 20}) for i in range(60)]
    (folder / "c.jsonl").write_text("\n".join(text))

    def tool(name: str, *flags: str | Path) -> None:
        done = run(PYTHON, f"tools/{name}.py", "--input", folder / "c.jsonl", *flags)
        assert done.returncode == 0, done.stderr

    gpt, bert = ["--tokenizer-type", "GPT2BPETokenizer"], ["--tokenizer-type", "BertWordPieceLowerCase"]
    tool("train_tokenizer", *gpt, "--vocab-size", "300", "--output", folder)
    tool("train_tokenizer", *bert, "--vocab-size", "64", "--output", folder)
    gpt += ["--vocab-file", str(folder / "vocab.json"), "--merge-file", str(folder / "merges.txt")]
    bert += ["--vocab-file", str(folder / "vocab.txt")]
    tool("preprocess_data", *gpt, "--output-prefix", folder / "c", "--append-eod")
    tool("preprocess_data", *bert, "--output-prefix", folder / "c", "--split-sentences")
    return {
        "gpt": [folder / "c_text_document", folder / "vocab.json", folder / "merges.txt"],
        "bert": [folder / "c_text_sentence", folder / "vocab.txt"],
    }


def model(script: str) -> str:
    return "gpt" if "gpt" in script else "bert"


def assert_trained(save: Path) -> None:
    """Two iterations, none of them skipped, and the evaluations at the end."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert [line["lm_loss"] is not None for line in lines] == [True] * 4
    assert [line.get("split") for line in lines] == [None, None, "validation", "test"]
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "2"


def test_pretraining_in_small(data: dict[str, list[Path]], tmp_path: Path) -> None:
    """All but pretrain_bert_distributed.sh, whose test comes next; and text from the first."""
    scripts = [name for name in SIZES if name != "pretrain_bert_distributed.sh"]

    def in_small(script: str) -> None:
        ranks = "4" if "_mp" in script else "2"
        done = run(FOLDER / script, *data[model(script)], tmp_path / script, *TINY.split(), GPUS=ranks)
        assert done.returncode == 0, script + done.stdout[-3000:] + done.stderr[-3000:]
        assert_trained(tmp_path / script)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(in_small, scripts))
    done = run(FOLDER / "generate_text.sh", tmp_path / "pretrain_gpt.sh", "9 green bottles", "--max-new-tokens", "5")
    assert done.returncode == 0 and done.stdout.startswith("9 green bottles") and len(done.stdout) > 20, done


def test_bert_on_two_machines(data: dict[str, list[Path]], tmp_path: Path) -> None:
    """pretrain_bert_distributed.sh, the same command on both; here both are this one."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    where = {"NNODES": "2", "GPUS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    command = [FOLDER / "pretrain_bert_distributed.sh", *data["bert"], tmp_path, *TINY.split()]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run, *command, **where) for _ in range(2)]
    for one in both:
        assert one.result().returncode == 0, one.result().stderr[-3000:]
    assert_trained(tmp_path)


def test_the_sizes_are_legal(data: dict[str, list[Path]], tmp_path: Path) -> None:
    """The scripts start 8 processes of that model, of that batch. A stand-in for Python says what it was to start, alone."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nuntil [ "${{1%.py}}" != "$1" ]; do echo "$1"; shift; done\nexec {PYTHON} "$@"\n')
    python.chmod(0o755)
    vocab = {"gpt": 300, "bert": len(data["bert"][1].read_text().splitlines()) + 2}  # [BOS] and [EOS]
    for script, (ranks, batch) in SIZES.items():
        count = ranks.split()[0]
        flags = ["--dry-run", "--world-size", count]
        done = run(FOLDER / script, *data[model(script)], tmp_path, *flags, PYTHON=str(python))
        assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
        assert ("--nproc-per-node\n8\n" in done.stdout) == (count == "8"), script
        assert f"# {ranks} " in done.stdout and f"global batch {batch} data-parallel ranks" in done.stdout, script
        assert f"# Parameters: {PARAMETERS[model(script)](vocab[model(script)]):,} in all" in done.stdout, script


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*_*.sh")))
def test_missing_arguments_are_said(script: str) -> None:
    done = run(FOLDER / script, "one")
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: {script} ") and len(done.stderr.splitlines()) == 1


def test_a_place_to_meet_is_asked_for() -> None:
    done = run(FOLDER / "distributed.sh", "pretrain_gpt.py", NNODES="2", MASTER_ADDR="")
    assert done.returncode == 2 and "MASTER_ADDR" in done.stderr
