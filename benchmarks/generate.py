"""Generated tokens per second, side by side in one run: this framework against transformers, and a server's clients.

    python benchmarks/generate.py                                all cases, then the server
    python benchmarks/generate.py --cases gpt2-small --rounds 9

Both have the same random weights, written by the export to Hugging Face, and must write the same tokens, greedily. They take
turns, round by round; a figure is the median over rounds, a ratio the median of the ratios within each round, and the ranges
are the smallest and the largest. The server answers 50 clients at once with one text each, in turn with one request for all 50
texts.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.save import save
from megatron.checkpoint.weights import ModuleWeights
from megatron.config.command_line.saved import to_json
from megatron.config.resolve import resolve_model
from megatron.config.schema import ModelSettings, RunSettings
from megatron.contract import StagePart
from megatron.data.tokenizer import ByteTokenizer
from megatron.inference.generate import extend_texts
from megatron.inference.restore import open_pipeline
from megatron.inference.sampling import Sampling
from megatron.inference.texts import GeneratedText
from megatron.interop.checked_export import export_hf
from megatron.mesh.mesh import Mesh
from megatron.model.gpt import GPT
from megatron.parallel.tensor_parallel import TensorParallel

GPT2_SMALL = ModelSettings(
    num_layers=12, hidden_size=768, num_attention_heads=12, max_position_embeddings=1024, vocab_size=50257
)
LLAMA = ModelSettings(
    num_layers=8,
    hidden_size=512,
    num_attention_heads=8,
    num_query_groups=4,
    max_position_embeddings=1024,
    vocab_size=32000,
    activation="swiglu",
    ffn_hidden_size=1408,
    normalization="RMSNorm",
    position_embedding_type="rope",
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
)
TINY = replace(GPT2_SMALL, num_layers=4, hidden_size=256, num_attention_heads=8, vocab_size=8192)
FORMS = {"gpt2-small": GPT2_SMALL, "llama": LLAMA, "tiny": TINY}
PROMPT, NEW = 32, 64  # tokens of each prompt, and of each text
CLIENTS = 50
TOOL = Path(__file__).resolve().parents[1] / "tools" / "text_generation_server.py"


def save_random(form: ModelSettings, root: Path) -> Path:
    """Save a model with random weights, far enough from zero that its text does not repeat itself."""
    settings = replace(form, hidden_dropout=0.0, attention_dropout=0.0)
    config = replace(resolve_model(settings), vocab_size=form.vocab_size)
    model = GPT(config, StagePart(range(config.num_layers), True, True), TensorParallel.alone())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 2.0 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    files = ByteTokenizer().files()
    return save(
        root, 1, {"model": ModuleWeights(model)}, Mesh.single(), config=to_json(RunSettings(model=config)), assets=files
    )


@dataclass(frozen=True)
class Ratio:
    """Rates of two contenders in tokens per second, and their ratio with its range."""

    ours: float
    theirs: float
    ratio: float
    lowest: float
    highest: float


def take_turns(ours: Callable[[], object], theirs: Callable[[], object], tokens: int, rounds: int) -> Ratio:
    """Time two contenders in turn.

    Args:
        ours: writes the tokens.
        theirs: the same.
        tokens: number of tokens that a turn writes.
        rounds: number of turns of each, after one to warm up.
    """
    seconds: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for who, write in enumerate((ours, theirs)):
            begun = time.perf_counter()
            write()
            if number:
                seconds[who].append(time.perf_counter() - begun)
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    rates = [tokens / statistics.median(times) for times in seconds]
    return Ratio(*rates, statistics.median(ratios), min(ratios), max(ratios))


def compare(form: ModelSettings, batch: int, rounds: int) -> Ratio:
    """Compare our generation with transformers'.

    Args:
        form: architecture of the model.
        batch: number of prompts, of one length.
        rounds: number of turns.
    """
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_random(form, Path(folder) / "ours")
        export_hf(checkpoint, Path(folder) / "hf", verify=False, say=lambda line: None)
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "hf").float().eval()
        ours = open_pipeline(checkpoint, Mesh.single()).model
        ours.pack_weights()
    draw = torch.Generator().manual_seed(3)
    prompts = torch.randint(form.vocab_size or 0, (batch, PROMPT), generator=draw)

    def write_ours() -> list[list[int]]:
        texts = [GeneratedText.from_prompt(row) for row in prompts.tolist()]
        for _ in extend_texts(ours, texts, max_new_tokens=NEW, sampling=Sampling(0.0)):
            pass
        return [text.tokens for text in texts]

    def write_theirs() -> list[list[int]]:
        more: dict[str, Any] = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        rows: list[list[int]] = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **more).tolist()
        return rows

    if write_ours() != write_theirs():
        raise SystemExit("error: the two do not write the same tokens")
    return take_turns(write_ours, write_theirs, batch * NEW, rounds)


@contextmanager
def serving(form: ModelSettings, *flags: str) -> Iterator[str]:
    """Serve a model from another process; yield the URL of its completions."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        checkpoint = save_random(form, Path(folder) / "ours")
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, str(TOOL), "--load", str(checkpoint), "--port", str(port), "--device", "cpu", *flags]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            while process.stderr and "serving" not in (line := process.stderr.readline()):
                if not line:
                    raise SystemExit("error: the server has ended")
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            process.kill()
            process.communicate()


def ask(url: str, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Return the texts of one request."""
    body = {"prompt": prompts, "max_tokens": NEW, "temperature": 0}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        return [choice["text"] for choice in json.load(reply)["choices"]]


def compare_clients(form: ModelSettings, rounds: int) -> Ratio:
    """Compare many clients with one text each to one client with as many texts.

    Args:
        form: architecture of the model.
        rounds: number of turns.
    """
    draw = torch.Generator().manual_seed(3)
    prompts = torch.randint(97, 123, (CLIENTS, PROMPT), generator=draw).tolist()
    with serving(form) as url, ThreadPoolExecutor(CLIENTS) as clients:

        def by_many() -> list[str]:
            return [text for (text,) in clients.map(lambda prompt: ask(url, [prompt]), prompts)]

        if by_many() != ask(url, prompts):
            raise SystemExit("error: a text depends on the texts beside it")
        return take_turns(by_many, lambda: ask(url, prompts), CLIENTS * NEW, rounds)


def print_row(name: str, found: Ratio) -> None:
    """Print a row of the table."""
    span = f"{found.lowest:.2f} - {found.highest:.2f}"
    print(f"| {name} | {found.ours:.0f} | {found.theirs:.0f} | {found.ratio:.2f}x | {span} |", flush=True)


def main(argv: Sequence[str]) -> int:
    """Print a table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", nargs="+", choices=[*FORMS, "server"], default=[*FORMS, "server"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print("| case | ours, tokens/s | the other's | ours is | range |\n|---|---|---|---|---|")
    for case in args.cases:
        if case == "server":
            for name, form in FORMS.items():
                print_row(f"50 clients against one request, {name}", compare_clients(form, args.rounds))
        else:
            for batch in (1, 8):
                print_row(f"{case}, batch {batch}", compare(FORMS[case], batch, args.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
