"""From text to a model in Hugging Face, on a CPU, in a few minutes: what `make quickstart` runs.

Each step is one command that anybody can type; this script prints it, runs it and stops at the first that fails. All that
comes out lies in runs/quickstart/, which every run begins anew.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout, also where it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.files.outputs import OutputError, check_replaceable, write_marker
    from megatron.launch.tool_parser import ToolParser

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = Path("runs/quickstart")  # relative to ROOT, where every command runs
MADE = ("corpus.jsonl", "tokenizer", "corpus_text_document.bin", "corpus_text_document.idx", "corpus_text_document.meta.json")
MADE += ("cache", "checkpoints", "hf", "loss.svg", "schedule.svg", "pipeline_profile.svg", "pipeline_profile.json")
CORPUS, DATA, TOKENIZER, SAVE = f"{OUT}/corpus.jsonl", f"{OUT}/corpus", f"{OUT}/tokenizer", f"{OUT}/checkpoints"
METRICS, CURVE, SCHEDULE, HF = f"{SAVE}/metrics.jsonl", f"{OUT}/loss.svg", f"{OUT}/schedule.svg", f"{OUT}/hf"
PROMPT = "The statement"
LOSS_SHARE = 0.7  # the last loss must be below this share of the first

MODEL = "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128"
MODEL += " --attention-dropout 0 --hidden-dropout 0"
BATCH = "--micro-batch-size 4 --global-batch-size 16 --train-iters 400"
MICRO_BATCHES = 4  # of a step: the whole batch goes through one pipeline
OPTIM = "--lr 5e-3 --min-lr 5e-4 --lr-decay-style cosine --lr-warmup-iters 40 --weight-decay 0.1 --adam-beta2 0.95"
PERIODS = "--log-interval 5 --eval-interval 100 --eval-iters 4 --save-interval 200"


class StepError(Exception):
    """A step failed; the message says which, and what it ran."""


def run(title: str, *command: str, **environment: str) -> None:
    """Print and run one command in ROOT. StepError when it exits with anything but 0."""
    shown = " ".join([*(f"{name}={value}" for name, value in environment.items()), shlex.join(command)])
    print(f"\n== {title}\n$ {shown}", flush=True)
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise StepError(f"{title} failed with exit status {done.returncode}; the command was\n  {shown}")
    print(f"   ({time.monotonic() - started:.0f} s)", flush=True)


def check_loss(metrics: Path) -> str:
    """The first and the last training loss in words. StepError when training did not bring it down."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = [r["lm_loss"] for r in records if "split" not in r and r.get("lm_loss") is not None]
    if not losses:
        raise StepError(f"{metrics} holds no training loss")
    words = f"loss {losses[0]:.2f} -> {losses[-1]:.2f}"
    if not losses[-1] <= LOSS_SHARE * losses[0]:  # also true for NaN
        raise StepError(f"{words}: training did not bring it below {LOSS_SHARE:.0%} of the first")
    return words


def begin_anew(out: Path) -> None:
    """Remove what the run before made, and nothing else: OutputError where something else is there."""
    check_replaceable("quickstart writes to", out, [], overwrite=True)
    if out.is_dir():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    write_marker(out, "quickstart", MADE)


def run_steps() -> str:
    """Run every command in its order. Returns what training did to the loss, in words; StepError for the first that fails."""
    python = os.path.relpath(sys.executable, ROOT) if Path(sys.executable).is_relative_to(ROOT) else sys.executable
    torchrun = Path(sys.executable).with_name("torchrun")
    launch = [str(Path(python).with_name("torchrun"))] if torchrun.exists() else [python, "-m", "torch.distributed.run"]
    with_tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", TOKENIZER]
    run("corpus: text that comes with Python", python, "examples/quickstart/corpus.py", CORPUS)
    run(
        "tokenizer: byte-level BPE",
        *(python, "tools/train_tokenizer.py", "--input", CORPUS, "--vocab-size", "2048", "--output", TOKENIZER),
    )
    run(
        "indexed dataset",
        *(python, "tools/preprocess_data.py", "--input", CORPUS, "--output-prefix", DATA),
        *(*with_tokenizer, "--append-eod", "--workers", "2"),
    )
    run(
        "the pipeline's schedule, drawn",
        *(python, "tools/draw_schedule.py", "--schedule", "1f1b", "--stages", "2"),
        *("--microbatches", str(MICRO_BATCHES), "--output", SCHEDULE),
    )
    run(
        "training: tensor parallel 2 x pipeline parallel 2, on 4 processes",
        *(*launch, "--nproc_per_node", "4", "pretrain_gpt.py"),
        *("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--profile-pipeline", str(OUT)),
        *(*shlex.split(f"{MODEL} {BATCH} {OPTIM} {PERIODS}"), *with_tokenizer),
        *("--data-path", f"{DATA}_text_document", "--split", "90,5,5", "--save", SAVE),
        OMP_NUM_THREADS="1",
    )
    words = check_loss(ROOT / METRICS)
    run("loss curve", python, "tools/plot_metrics.py", METRICS, "--output", CURVE, "--title", "Quickstart GPT")
    run("export to Hugging Face", python, "tools/export_hf.py", "--load", SAVE, "--output", HF)
    run(
        "text from the checkpoint",
        *(python, "tools/generate.py", "--load", SAVE, "--prompt", PROMPT),
        *("--max-new-tokens", "60", "--temperature", "0.8", "--top-k", "40", "--seed", "1"),
    )
    run("text from transformers", python, "examples/quickstart/open_in_transformers.py", HF, "--prompt", PROMPT)
    return words


def main() -> int:
    """Run the quickstart, and return its exit status."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()  # it takes nothing but --help
    started = time.monotonic()
    try:
        begin_anew(ROOT / OUT)
    except OutputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        words = run_steps()
    except StepError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(f"\nDone in {time.monotonic() - started:.0f} s: {words}. Made:")
    made = {
        CORPUS: "the text",
        TOKENIZER: "its tokenizer",
        f"{DATA}_text_document.bin": "the tokens, with .idx beside them",
        SAVE: "checkpoints and metrics.jsonl",
        CURVE: "the loss curve",
        SCHEDULE: "the pipeline's schedule",
        f"{OUT}/pipeline_profile.svg": "the pipeline as it ran, and as predicted",
        HF: "the Hugging Face directory",
    }
    for path, what in made.items():
        print(f"  {path:42} {what}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
