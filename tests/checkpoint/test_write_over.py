"""Every tool and program, told to write over what it reads: status 2, one error in words, and every byte as it was."""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from archives import build, named_weights, read_files, released_state, small_config, write_archive
from models import BASE, save_model

from megatron.cli.program import pretrain, run_task
from megatron.data.indexed import IndexedWriter, token_dtype
from megatron.data.tokenizer import ByteTokenizer
from megatron.interop.checked_export import export_hf
from megatron.interop.megatron_files import write_megatron

ROOT = Path(__file__).parents[2]
BYTES = "--tokenizer-type ByteTokenizer"
WORDS = "--tokenizer-type BertWordPieceCase --vocab-size 99"
RUN = (
    "--save-interval 1 --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 48 "
    "--micro-batch-size 1 --train-iters 1 --lr 1e-3 --split 1 --data-path a --config run.toml "
    "--tokenizer-type GPT2BPETokenizer --vocab-file text/vocab.json --merge-file text/merges.txt"
)
TASK = "--task WIKITEXT103 --load run --valid-data text/valid.txt"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """One of everything that a tool reads."""
    root = tmp_path_factory.mktemp("inputs")
    for name in ("a", "b"):
        with IndexedWriter(str(root / name), token_dtype(257)) as writer:
            writer.add_document(torch.arange(100).numpy(), [100])
            writer.finish({"tokenizer_digest": "T0"})
    (root / "text").mkdir()
    for name in ("corpus_text_document.bin", "corpus.bad.jsonl", "corpus.jsonl"):
        (root / "text" / name).write_text(json.dumps({"text": "some text"}) + "\n")
    for name in ("vocab.txt", "valid.txt", "merges.txt", "train.jsonl", "corpus_text_document.idx"):
        (root / "text" / name).write_text("a b\nc d\n")
    (root / "text" / "vocab.json").write_text('{"a": 0}')
    (root / "run.toml").write_text("[batch]\nseed = 3\n")
    (root / "metrics.jsonl").write_text('{"iteration": 1, "lm_loss": 2.0}\n')
    (root / "notes.md").write_text("# Notes\n")
    save_model(str(root / "run"), BASE | {"vocab_size": 257}, 1, torch.float32, ByteTokenizer())
    export_hf(root / "run", root / "hf", verify=False, say=lambda line: None)
    (root / "own").mkdir()
    shutil.copy(root / "hf" / "config.json", root / "own")
    config = small_config(vocab_size=257)
    write_megatron(root / "megatron", 10, config, named_weights(build(config)), tp=1, pp=1, tokenizer_type=None)
    shutil.copytree(root / "megatron", root / "meg2")
    made = released_state(config, named_weights(build(config)), 3.0, 257)
    args = dict(num_layers=4, hidden_size=32, num_attention_heads=4, max_position_embeddings=48, padded_vocab_size=257)
    args |= dict(ffn_hidden_size=80)
    (root / "archive").mkdir()
    write_archive(root / "archive" / "model.pt", made, 3.0, args)
    shutil.move(root / "archive" / "model.pt", root / "archive" / "model.safetensors")
    shutil.copytree(root / "run" / "iter_0000010", root / "run2" / "iter_0000020")
    (root / "link").symlink_to("run")
    (root / "nested").mkdir()
    return root


TOOLS = {
    "export over the run": "export_hf --load run --output run --overwrite",
    "export over the checkpoint": "export_hf --load run --output run/iter_0000010 --overwrite",
    "export into the checkpoint": "export_hf --load run/iter_0000010 --output run/iter_0000010/hf",
    "export over a parent": "export_hf --load run --output nested/.. --overwrite",
    "export to here": "export_hf --load run --output . --overwrite",
    "export over a link to the run": "export_hf --load run --output link --overwrite",
    "export over a link, from it": "export_hf --load link/ --output run/ --overwrite",
    "export over somebody's directory": "export_hf --load run --output own --overwrite",
    "export over an export": "export_hf --load run --output hf",
    "export over a file": "export_hf --load run --output notes.md --overwrite",
    "import over the directory": "import_hf --input hf --save hf",
    "import over the directory, linked": "import_hf --input hf --save nested/../hf/",
    "import over Megatron-LM's": "import_megatron --load megatron --save megatron",
    "import over Megatron-LM's iteration": "import_megatron --load megatron/iter_0000010 --save megatron",
    "import over another of Megatron-LM's": "import_megatron --load megatron --save meg2",
    "export to Megatron-LM over the run": "export_megatron --load run --save run",
    "export to Megatron-LM over its iteration": "export_megatron --load run/iter_0000010 --save run",
    "import into Megatron-LM's": "import_hf --input hf --save megatron",
    "export to Megatron-LM into another run": "export_megatron --load run --save run2",
    "export to Megatron-LM into the checkpoint": "export_megatron --load run --save run/iter_0000010",
    "convert over the archive": "convert_megatron_gpt2_checkpoint archive/model.safetensors",
    "convert over --config_file": "convert_megatron_gpt2_checkpoint --config_file own/config.json own/model.pt",
    "preprocess over a dataset": f"preprocess_data {BYTES} --output-prefix text/corpus --input text/corpus_text_document.bin",
    "preprocess over an index": f"preprocess_data {BYTES} --output-prefix text/corpus --input text/corpus_text_document.idx",
    "preprocess over the bad lines": f"preprocess_data {BYTES} --output-prefix text/corpus --input text/corpus.bad.jsonl",
    "merge into an input": "merge_datasets --input a b --output-prefix a",
    "merge into an input, linked": "merge_datasets --input a b --output-prefix nested/../b",
    "train over the text": f"train_tokenizer {WORDS} --input text/vocab.txt --output text",
    "train BPE over the text": "train_tokenizer --vocab-size 300 --input text/merges.txt --output text",
    "plot over the metrics": "plot_metrics metrics.jsonl --output metrics.jsonl",
    "plot over something else": "plot_metrics metrics.jsonl --output notes.md",
    "draw over something else": "draw_schedule --schedule 1f1b --stages 2 --microbatches 2 --output metrics.jsonl",
    "prepare over the text": "prepare text/train.jsonl text",
}
PROGRAMS = {
    f"{program} {flags}": (program, flags)
    for program, flags in [
        ("run", "--metrics-path a.bin"),
        ("run", "--metrics-path nested/../a.meta.json"),
        ("run", "--metrics-path text/merges.txt"),
        ("run", "--metrics-path run.toml"),
        ("run", "--metrics-path notes.md"),
        ("run", "--stop-file a.idx"),
        ("run", "--stop-file text/vocab.json"),
        ("run", "--save run/iter_0000010"),
        ("run", "--save meg2"),
        ("run", "--load run --finetune --metrics-path run/iter_0000010/manifest.json"),
        ("run", "--profile-pipeline a.bin"),
        ("run", "--tensorboard-dir a.bin"),
        ("task", "--results-path text/valid.txt"),
        ("task", "--results-path link/iter_0000010/config.json"),
        ("task", "--results-path notes.md"),
        ("task", "--results-path metrics.jsonl --metrics-path metrics.jsonl"),
    ]
}


def said_by(script: Path, argv: str, monkeypatch: pytest.MonkeyPatch) -> tuple[object, str]:
    monkeypatch.setattr(sys, "argv", [script.name, *argv.split()])
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as done:
        runpy.run_path(str(script), run_name="__main__")
    return done.value.code, err.getvalue()


def assert_inputs_unchanged(inputs: Path, before: dict[str, bytes], code: object, err: str) -> None:
    assert code == 2, err
    assert "Traceback" not in err and err.startswith("error: "), err
    assert read_files(inputs) == before and (inputs / "link").is_symlink()


@pytest.mark.parametrize("case", TOOLS)
def test_no_tool_writes_over_what_it_reads(inputs: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    name, _, argv = TOOLS[case].partition(" ")
    monkeypatch.chdir(inputs)
    if case == "convert over --config_file":
        shutil.copy("archive/model.safetensors", "own/model.pt")
    before = read_files(inputs)
    script = ROOT / ("examples/tiny_shakespeare_char" if name == "prepare" else "tools") / f"{name}.py"
    assert_inputs_unchanged(inputs, before, *said_by(script, argv + " --no-verify" * (name == "export_hf"), monkeypatch))


@pytest.mark.parametrize("case", PROGRAMS)
def test_no_program_writes_over_what_it_reads(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    program, flags = PROGRAMS[case]
    monkeypatch.chdir(inputs)
    before = read_files(inputs)
    with pytest.raises(SystemExit) as done:
        if program == "run":
            pretrain(f"{RUN} {flags}".split(), program="pretrain_gpt.py", defaults={})
        else:
            run_task(f"{TASK} {flags}".split(), program="tasks/main.py", defaults={"batch.micro_batch_size": 8})
    err = capsys.readouterr().err
    flag = flags.rsplit(" --", 1)[-1].split()[0].lstrip("-")
    assert err.count("error: ") == 1 and flag in err, err  # this is what is wrong, and nothing else
    assert_inputs_unchanged(inputs, before, done.value.code, err)


def test_the_same_commands_elsewhere_are_carried_out(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)
    before = read_files(inputs)
    for argv in (
        f"export_hf --load run --output {tmp_path}/hf --no-verify",
        f"export_hf --load link --output {tmp_path}/hf --no-verify --overwrite",
        f"import_hf --input hf --save {tmp_path}/run",
        f"import_megatron --load megatron --save {tmp_path}/run2 --vocab-size 257",
        f"export_megatron --load run --save {tmp_path}/meg",
        f"merge_datasets --input a b --output-prefix {tmp_path}/c",
        f"plot_metrics metrics.jsonl --output {tmp_path}/loss.svg",
        f"plot_metrics metrics.jsonl --output {tmp_path}/loss.svg",
    ):
        name, _, rest = argv.partition(" ")
        code, err = said_by(ROOT / "tools" / f"{name}.py", rest, monkeypatch)
        assert code == 0, err
    assert read_files(inputs) == before
    assert not [path for path in tmp_path.rglob("*.tmp")] and os.path.exists(tmp_path / "hf" / "config.json")
