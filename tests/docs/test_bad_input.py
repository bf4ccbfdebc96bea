"""Every program and tool against every kind of bad input: status 1 or 2, at most three lines, never a traceback.

A row for each place of a command line where a user puts a file, a directory or a value; a column for each thing that
people put there by mistake. All run in this process, one after the other.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import random_gpts

from megatron.config.schema import ModelSettings
from megatron.data.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[2]
MAX_LINES = 3
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a2146' * 8}\nsize 12345\n"
CONFIG = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}


def unreal(folder: Path, name: str) -> str:
    return str(folder / name / "deep")


def file(content: bytes) -> Callable[[Path, str], str]:
    def make(folder: Path, name: str) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return make


def link(folder: Path, name: str) -> str:
    (folder / name).symlink_to(folder / "nowhere")
    return str(folder / name)


def pipe(folder: Path, name: str) -> str:
    os.mkfifo(folder / name)
    return str(folder / name)


def directory(**files: bytes) -> Callable[[Path, str], str]:
    def make(folder: Path, name: str) -> str:
        (folder / name).mkdir()
        for file_name, content in files.items():
            (folder / name / file_name.replace("__", ".")).write_bytes(content)
        return str(folder / name)

    return make


FILES = {
    "missing": unreal,
    "a link to nothing": link,
    "a named pipe": pipe,
    "an empty file": file(b""),
    "random bytes": file(bytes(range(256)) * 8),
    "half a surrogate pair": file(b'{"text": "\\ud800"}\n'),
    "a git-lfs pointer": file(LFS.encode()),
    "a file with a NUL": file(b"\0"),
    "a list": file(b"[]"),
    "a number": file(b"7"),
    "deep JSON": file(b"[" * 100_000),
    "a name on a hub": lambda folder, name: "meta-llama/Llama-3.1-8B",
    "nothing": lambda folder, name: "",
    "a name too long": lambda folder, name: str(folder / ("x" * 5000)),
    "an empty directory": directory(),
    "a directory of a model without weights": directory(config__json=json.dumps(CONFIG).encode()),
    "a config.json with a byte-order mark": directory(config__json=b"\xef\xbb\xbf" + json.dumps(CONFIG).encode()),
    "a config.json that is a list": directory(config__json=b"[]"),
    "pickled weights": directory(config__json=json.dumps(CONFIG).encode(), pytorch_model__bin=b"\x80\x02."),
    "weights that are a pointer": directory(config__json=json.dumps(CONFIG).encode(), model__safetensors=LFS.encode()),
    "a tracker of nothing": directory(latest_checkpointed_iteration__txt=b"100\n"),
    "a tracker of no number": directory(latest_checkpointed_iteration__txt=b"\xff\n"),
}
PLACES = {  # where something is to be written
    "a file": file(b"mine\n"),
    "below a file": lambda folder, name: file(b"mine\n")(folder, name) + "/below",
    "a link to nothing": link,
    "a place that cannot be": lambda folder, name: "/proc/nobody/may",
    "a device": lambda folder, name: "/dev/null",
    "nothing": lambda folder, name: "",
    "a name too long": lambda folder, name: str(folder / ("x" * 5000)),
    "somebody's directory": directory(thesis__txt=b"mine\n"),
}
NEVER = ("below a file", "a place that cannot be", "nothing", "a name too long")  # also where a file may be written over
MEANS_SOMETHING = {("--config", "an empty file"), ("--split", "1.5"), ("--temperature", "1.5"), ("--lr", "1.5")}
# A text may be anything.
MEANS_SOMETHING |= {
    (flag, kind)
    for flag in ("--valid-data", "--prompt-file")
    for kind in ("half a surrogate pair", "a file with a NUL", "a list", "a number", "deep JSON")
}
VALUES = {name: lambda folder, _, name=name: name for name in ("", "x", "-1", "nan", "1e400", "1.5", "9" * 5000, "\udcff")}

GPT = (
    "pretrain_gpt.py --num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --max-position-embeddings 8"
    " --micro-batch-size 1 --train-iters 1 --lr 1e-3 --eval-iters 0 --save-interval 1 --split 1,0,0"
)
BYTES = f"{GPT} --tokenizer-type ByteTokenizer"
BERT = GPT.replace("pretrain_gpt.py", "pretrain_bert.py") + " --tokenizer-type BertWordPieceLowerCase"
TASK = "tasks/main.py --task {} --pretrained-checkpoint {{bert}} --micro-batch-size 1 --epochs 1 --lr 1e-3"
CORPUS = "tools/preprocess_data.py --output-prefix {new} --input {corpus}"
LEARN = "tools/train_tokenizer.py --output {new} --input {corpus} --vocab-size 300"
SAMPLES = "tools/inspect_dataset.py {prefix}"
DRAW = "tools/draw_schedule.py --schedule 1f1b --stages 2 --microbatches 2"
WRITE = "tools/generate.py --load {gpt} --prompt x --max-new-tokens 1"
SERVE = "tools/text_generation_server.py --load {gpt}"

READ = [  # the last flag takes what FILES say
    f"{BYTES} --data-path", f"{BYTES} --data-path {{prefix}} --load", f"{BYTES} --data-path {{prefix}} --config",
    f"{GPT} --tokenizer-type GPT2BPETokenizer --data-path {{prefix}} --merge-file {{vocab}} --vocab-file",
    f"{GPT} --tokenizer-type GPT2BPETokenizer --data-path {{prefix}} --vocab-file {{json}} --merge-file",
    f"{GPT} --tokenizer-type SentencePieceTokenizer --data-path {{prefix}} --tokenizer-model",
    f"{GPT} --tokenizer-type HuggingFaceTokenizer --data-path {{prefix}} --tokenizer-model",
    f"{BERT} --data-path {{prefix}} --vocab-file", f"{BERT} --vocab-file {{vocab}} --data-path",
    *(f"{TASK.format(task)} --valid-data {{corpus}} --train-data" for task in ("MNLI", "QQP", "SQUAD", "NER")),
    f"{TASK.format('MNLI')} --train-data {{corpus}} --valid-data",
    "tasks/main.py --task SQUAD --train-data {corpus} --valid-data {corpus} --epochs 1 --lr 1e-3 --pretrained-checkpoint",
    *(f"tasks/main.py --task {task} --load {{gpt}} --valid-data" for task in ("WIKITEXT103", "LAMBADA", "PERPLEXITY")),
    "tasks/main.py --task LAMBADA --valid-data {corpus} --load",
    "tools/preprocess_data.py --output-prefix {new} --tokenizer-type ByteTokenizer --input",
    f"{CORPUS} --tokenizer-type BertWordPieceLowerCase --vocab-file",
    f"{CORPUS} --tokenizer-type HuggingFaceTokenizer --tokenizer-model",
    f"{CORPUS} --tokenizer-type SentencePieceTokenizer --tokenizer-model",
    "tools/train_tokenizer.py --vocab-size 300 --output {new} --input", "tools/inspect_dataset.py",
    "tools/merge_datasets.py --output-prefix {new} --input", "tools/plot_metrics.py --output {new}.svg",
    "tools/inspect_checkpoint.py", "tools/verify_checkpoint.py", "tools/export_hf.py --output {new} --load",
    "tools/import_hf.py --save {new} --input", "tools/import_megatron.py --save {new} --load",
    "tools/export_megatron.py --save {new} --load", "tools/convert_megatron_gpt2_checkpoint.py",
    "tools/convert_megatron_bert_checkpoint.py", "tools/convert_megatron_gpt2_checkpoint.py --config_file {json}",
    "tools/generate.py --prompt x --max-new-tokens 1 --load", "tools/generate.py --load {gpt} --prompt-file",
    "tools/text_generation_server.py --load",
]  # fmt: skip
TAKEN = [  # the last flag takes what PLACES say
    "tools/export_hf.py --load {gpt} --output",
    "tools/import_hf.py --input {empty} --save",
    "tools/import_megatron.py --load {empty} --save",
]
WRITTEN = [  # what NEVER names of them
    f"{BYTES} --data-path {{prefix}} --save",
    "tools/preprocess_data.py --tokenizer-type ByteTokenizer --input {corpus} --output-prefix",
    "tools/train_tokenizer.py --vocab-size 300 --input {corpus} --output",
    "tools/merge_datasets.py --input {prefix} --output-prefix",
    "tools/plot_metrics.py {metrics} --output",
    "tools/export_megatron.py --load {gpt} --save",
    f"{DRAW} --output",
]
ASKED = [  # the last flag takes what VALUES say
    *(f"{BYTES} --data-path {{prefix}} --{flag}" for flag in ("lr", "num-layers", "seed", "split", "global-batch-size")),
    *(f"{CORPUS} --tokenizer-type {name}" for name in ("ByteTokenizer --workers", "ByteTokenizer --partitions", "")),
    f"{LEARN} --vocab-size", f"{SAMPLES} --samples", f"{SAMPLES} --seq-length 8 --samples 1 --split",
    f"{SAMPLES} --documents",
    *(f"{DRAW} --{flag}" for flag in ("stages", "microbatches", "chunks", "costs", "schedule")),
    *(f"{WRITE} --{flag}" for flag in ("max-new-tokens", "temperature", "top-p", "top-k", "beam-width", "load-iteration")),
    *(f"{SERVE} --{flag}" for flag in ("port", "load-iteration")), "tasks/main.py --load {gpt} --valid-data {corpus} --task",
    "tools/inspect_checkpoint.py {gpt} --load-iteration", "tools/verify_checkpoint.py {gpt} --load-iteration",
    "tools/export_megatron.py --load {gpt} --save {new} --target-tensor-parallel-size",
    "tools/export_hf.py --load {gpt} --output {new} --dtype",
]  # fmt: skip
PROGRAMS = sorted({row.split()[0] for row in READ + TAKEN + WRITTEN + ASKED})


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, bert: SimpleNamespace) -> dict[str, str]:
    """Make the good inputs that the rows name: a checkpoint, a corpus, a dataset, files of a vocabulary."""
    folder = tmp_path_factory.mktemp("good")
    form = ModelSettings(num_layers=1, hidden_size=8, num_attention_heads=1)
    words = ByteTokenizer()
    random_gpts.save_model(random_gpts.build_random_gpt(form, words.vocab_size), folder / "gpt", words.files())
    (folder / "corpus.jsonl").write_text('{"text": "some words of a text"}\n' * 50)
    (folder / "some.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"iteration": 1, "lm_loss": 2.0}\n')
    (folder / "empty").mkdir()
    made = {"gpt": "gpt", "corpus": "corpus.jsonl", "prefix": "c_text_document", "json": "some.json", "empty": "empty"}
    named = {name: str(folder / path) for name, path in {**made, "metrics": "metrics.jsonl"}.items()}
    row = f"tools/preprocess_data.py --output-prefix {folder / 'c'} --input {named['corpus']} --tokenizer-type ByteTokenizer"
    assert run_here(row.split())[0] == 0
    return {**named, "vocab": bert.vocab, "bert": bert.checkpoint}


def run_here(words: list[str]) -> tuple[object, str]:
    """The status of a program that is run here, and what it says on stderr."""
    said, status = io.StringIO(), None
    with patch.object(sys, "argv", [str(ROOT / words[0]), *words[1:]]), redirect_stdout(io.StringIO()), redirect_stderr(said):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
    return status or 0, said.getvalue()


def faults(row: str, kinds: dict[str, Callable[[Path, str], str]], good: dict[str, str], folder: Path) -> list[str]:
    """Return what is wrong with the answers of one row; each input lies in a directory of its own."""
    found: list[str] = []
    for number, (kind, make) in enumerate(kinds.items()):
        if (row.rsplit(maxsplit=1)[-1], kind) in MEANS_SOMETHING:
            continue
        here = folder / str(number)
        here.mkdir()
        words = [*shlex.split(row.format(**good, new=here / "new")), make(here, "bad")]
        try:
            status, said = run_here(words)
        except BaseException as error:  # the test's alarm among them
            found.append(f"{kind}: {type(error).__name__}: {str(error)[:200]}")
            continue
        lines = said.splitlines()
        if status not in (1, 2) or not lines or len(lines) > MAX_LINES or "Traceback" in said:
            found.append(f"{kind}: status {status}, {len(lines)} lines: {said[:400]!r}")
    return found


def assert_no_faults(found: list[str]) -> None:
    if found:
        pytest.fail("\n".join(found), pytrace=False)


@pytest.fixture
def impatient() -> Iterator[None]:
    """No answer takes longer than a minute, however busy the machine."""

    def ring(*_: object) -> None:
        raise TimeoutError("no answer")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("row", READ)
def test_bad_input_files_are_refused_in_words(row: str, good: dict[str, str], tmp_path: Path, impatient: None) -> None:
    assert_no_faults(faults(row, FILES, good, tmp_path))


@pytest.mark.parametrize("row", TAKEN + WRITTEN)
def test_bad_output_places_are_refused_in_words(row: str, good: dict[str, str], tmp_path: Path, impatient: None) -> None:
    assert_no_faults(faults(row, PLACES if row in TAKEN else {kind: PLACES[kind] for kind in NEVER}, good, tmp_path))


@pytest.mark.parametrize("row", ASKED)
def test_bad_values_are_refused_in_words(row: str, good: dict[str, str], tmp_path: Path, impatient: None) -> None:
    assert_no_faults(faults(row, VALUES, good, tmp_path))


@pytest.mark.parametrize("program", PROGRAMS)
def test_flags_that_nobody_knows(program: str, good: dict[str, str], tmp_path: Path) -> None:
    kinds = {"a flag": lambda *_: "--unheard-of", "a dash": lambda *_: "-", "many": lambda *_: "--no-such=1"}
    row = {"pretrain_gpt.py": f"{BYTES} --mock-data", "pretrain_bert.py": f"{BERT} --mock-data --vocab-file {{vocab}}"}
    assert_no_faults(faults(row.get(program, program), kinds, good, tmp_path))
