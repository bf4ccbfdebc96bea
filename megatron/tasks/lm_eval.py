"""lm-evaluation-harness (the package lm_eval, arXiv 2405.14782) on a checkpoint of any layout, without converting it.

    python -m megatron.tasks.lm_eval --load CKPT --tasks hellaswag --num_fewshot 5 --output_path results
    torchrun --nproc_per_node 4 -m megatron.tasks.lm_eval --load CKPT \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --tasks hellaswag

What is not listed here goes to lm_eval's own command line; --output_path writes its JSON. From Python the model is known as
"megatron" once `register()` was called: `lm_eval.simple_evaluate(model="megatron", model_args="load=CKPT", tasks=[...])`.
Needs `pip install -e '.[eval]'`. On several processes the first one runs lm_eval, the others compute along with it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron.launch.entry import loading, run_main

with loading():
    import torch

    from megatron.launch.tool_parser import ToolParser

from megatron.checkpoint.find import find
from megatron.checkpoint.layout import CheckpointError
from megatron.config.errors import ConfigError
from megatron.data.errors import DataError
from megatron.inference.generate import Sampling, choose_device
from megatron.inference.model_flags import add_model_flags, layout_of, parse_once, report_refusal
from megatron.inference.restore import open_pipeline
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.job import Job, job
from megatron.launch.packages import install_command
from megatron.mesh.mesh import Mesh
from megatron.tasks.leading import Led, follow
from megatron.tasks.likelihood import Likelihoods
from megatron.tasks.scoring import check_scored, needed_tokenizer

NAME = "megatron"
MICRO_BATCH = 8
DEFAULT_TOKENS = 256  # of a generated text: the harness's own default
TIMEOUT_MINUTES = 24 * 60.0  # the others wait while the first process reads data sets and computes metrics
REFUSED = (CheckpointError, ConfigError, DataError)  # what was asked for cannot be done; needs no traceback


def likelihoods(
    load: Path | str,
    mesh: Mesh,
    *,
    iteration: int | None = None,
    seq_length: int | None = None,
    micro_batch_size: int = MICRO_BATCH,
    device: torch.device | str = "cpu",
) -> Likelihoods:
    """A checkpoint, ready to be asked. Collective. seq_length: default all positions that the model was made with.

    CheckpointError, ConfigError or DataError for one that cannot be.
    """
    opened = open_pipeline(load, mesh, iteration=iteration, device=device)
    length = seq_length or opened.config.max_position_embeddings
    check_scored(opened, length, length, micro_batch_size)
    return Likelihoods(opened.model, needed_tokenizer(opened), length, micro_batch_size)


def harness_model(ready: Likelihoods | None = None) -> type[Any]:
    """The harness's subclass for our checkpoints. ready: what it asks, in place of opening what its arguments name."""
    from lm_eval.api.model import LM

    class MegatronLM(LM):  # type: ignore[misc, unused-ignore]
        """model_args: load (or pretrained), load_iteration, seq_length; device and batch_size are the harness's."""

        def __init__(
            self,
            *,
            load: str | None = None,
            pretrained: str | None = None,
            load_iteration: int | None = None,
            seq_length: int | None = None,
            batch_size: int | str | None = None,
            max_batch_size: int | None = None,
            device: str | None = None,
        ) -> None:
            super().__init__()
            if ready is not None:
                self.model = ready
                return
            if (checkpoint := load or pretrained) is None:
                raise ValueError("--model_args needs load=CKPT, the directory of a checkpoint")
            gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
            self.model = likelihoods(
                checkpoint,
                Mesh.single(),
                iteration=load_iteration,
                seq_length=seq_length,
                micro_batch_size=int(str(batch_size)) if str(batch_size).isdigit() else MICRO_BATCH,
                device=choose_device(device, gpus),
            )

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return self.model.of_continuations([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return self.model.of_texts([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return [written(self.model, *request.args) for request in requests]

        @property
        def tokenizer_name(self) -> str:
            return self.model.tokenizer.digest()

    return MegatronLM


def written(model: Likelihoods, prompt: str, asked: Mapping[str, Any]) -> str:
    """The text for one request of the harness; asked: its generation arguments, greedy unless do_sample is true."""
    until = asked.get("until") or []
    most = next(
        (int(asked[name]) for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if asked.get(name)), DEFAULT_TOKENS
    )
    sampling = Sampling(temperature=0.0)
    if asked.get("do_sample"):
        sampling = Sampling(asked.get("temperature", 1.0), int(asked.get("top_k", 0)), asked.get("top_p", 0.0))
    return model.until(prompt, [until] if isinstance(until, str) else list(until), most, sampling)


def register(ready: Likelihoods | None = None) -> None:
    """Make the model "megatron" known to lm_eval in this process. ImportError without the package."""
    from lm_eval.api.registry import register_model

    register_model(NAME)(harness_model(ready))


def main(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    parser = ToolParser(
        prog="python -m megatron.tasks.lm_eval",
        description="lm-evaluation-harness on a checkpoint of any layout",
        epilog="Everything else goes to lm_eval: --tasks, --num_fewshot, --limit, --output_path, ...; see lm_eval --help.",
        allow_abbrev=False,
    )
    add_model_flags(parser)
    parser.add_argument("--seq-length", type=int, help="tokens that the model sees at once; default all its positions")
    parser.add_argument("--micro-batch-size", type=int, default=MICRO_BATCH, help=f"texts in one pass (default {MICRO_BATCH})")
    args, theirs = parse_once(parser.parse_known_args, argv)
    env = LaunchEnvironment()
    try:
        env = LaunchEnvironment.from_environ(os.environ)
        grid, device = layout_of(args, env)
        if find_spec("lm_eval") is None:
            raise ValueError(f"lm-evaluation-harness is not installed: {install_command('lm_eval')}")
        find(
            Path(args.load),
            args.load_iteration,
            lambda line: print(f"note: {line}", file=sys.stderr) if env.rank == 0 else None,
        )
    except (ValueError, *REFUSED) as error:
        return report_refusal(error, env)
    try:
        with job(env, timeout_minutes=TIMEOUT_MINUTES, explain=in_words) as started:
            own = device if env.world_size == 1 else started.device
            mesh = Mesh.build(grid, env.rank, started.timeout, watch=started.watch)
            run(args, theirs, started, mesh, own)
    except REFUSED as error:
        return report_refusal(error, env)
    return 0


def in_words(error: BaseException, where: str) -> str | None:
    """An error that needs no traceback; None for any other."""
    return str(error) if isinstance(error, REFUSED) else None


def run(args: argparse.Namespace, theirs: Sequence[str], started: Job, mesh: Mesh, device: torch.device) -> None:
    """lm_eval on the first process, its model on all of them. Collective."""
    model = likelihoods(
        args.load,
        mesh,
        iteration=args.load_iteration,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        device=device,
    )
    if mesh.world.size == 1:
        harness(model, args.load, theirs)
    elif mesh.world.first:
        started.watch.doing("running lm-evaluation-harness")
        led = Led(model.model, mesh.world)
        harness(Likelihoods(led, model.tokenizer, model.seq_length, model.micro_batch_size), args.load, theirs)
        led.finish()
    else:
        started.watch.waiting("lm-evaluation-harness on the first process")
        follow(model.model, mesh.world)


def harness(model: Likelihoods, load: str, theirs: Sequence[str]) -> None:
    """lm_eval's own command line, with our model."""
    from lm_eval.__main__ import cli_evaluate

    register(model)
    records = [] if set(load) & set("=, ") else ["--model_args", f"load={load}"]  # what the harness writes down, if it can
    sys.argv = ["lm_eval", "--model", NAME, *records, *theirs]
    try:
        cli_evaluate()
    except SystemExit as ended:
        if ended.code:
            raise


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
