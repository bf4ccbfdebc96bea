r"""Run lm-evaluation-harness (the package lm_eval, arXiv 2405.14782) on a checkpoint of any layout, without converting it.

    python -m megatron.tasks.lm_eval --load CKPT --tasks hellaswag --num_fewshot 5 --output_path results
    torchrun --nproc_per_node 4 -m megatron.tasks.lm_eval --load CKPT \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --tasks hellaswag

Flags that this program does not know are passed to lm_eval's command line, such as --output_path, where it writes its JSON. In
Python, after `register()`: `lm_eval.simple_evaluate(model="megatron", model_args="load=CKPT", tasks=[...])`. Needs
`pip install -e '.[eval]'`. On several processes, rank 0 runs lm_eval, and the others compute their parts of the model.
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

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layout import CheckpointError
from megatron.config.errors import ConfigError
from megatron.data.errors import DataError
from megatron.inference.generate import choose_device
from megatron.inference.model_flags import add_model_flags, choose_layout, parse_once, report_refusal
from megatron.inference.restore import open_pipeline
from megatron.inference.sampling import Sampling
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.job import Job, job
from megatron.launch.packages import install_command
from megatron.mesh.mesh import Mesh
from megatron.tasks.leader import LeaderModel, follow_leader
from megatron.tasks.likelihood import Likelihoods
from megatron.tasks.scoring import check_scoring_sizes, require_tokenizer

MODEL_NAME = "megatron"  # name of our model class in the harness
DEFAULT_MICRO_BATCH_SIZE = 8
DEFAULT_MAX_TOKENS = 256  # maximum number of generated tokens, as in the harness
TIMEOUT_MINUTES = 24 * 60.0  # the other ranks wait while rank 0 reads data sets and computes metrics
INPUT_ERRORS = (CheckpointError, ConfigError, DataError)  # errors in the user's input, reported without a traceback


def open_likelihoods(
    load: Path | str,
    mesh: Mesh,
    *,
    iteration: int | None = None,
    seq_length: int | None = None,
    micro_batch_size: int = DEFAULT_MICRO_BATCH_SIZE,
    device: torch.device | str = "cpu",
) -> Likelihoods:
    """Open a checkpoint for scoring. Collective.

    Args:
        load: directory of checkpoints.
        mesh: mesh of the ranks that share the model.
        iteration: iteration of the checkpoint; None for the newest.
        seq_length: tokens that the model reads at once; None for its maximum.
        micro_batch_size: number of windows in one forward pass.
        device: device of this rank.

    Raises:
        CheckpointError, ConfigError, DataError: the checkpoint cannot be scored.
    """
    opened = open_pipeline(load, mesh, iteration=iteration, device=device)
    length = seq_length or opened.config.max_position_embeddings
    check_scoring_sizes(opened, length, length, micro_batch_size)
    return Likelihoods(opened.model, require_tokenizer(opened), length, micro_batch_size)


def harness_model(opened: Likelihoods | None = None) -> type[Any]:
    """Return a model class of the harness for our checkpoints. Its objects use the model `opened`, if given, or open one."""
    from lm_eval.api.model import LM

    class MegatronLM(LM):  # type: ignore[misc, unused-ignore]
        """A checkpoint as a model of the harness; --model_args may set load (or pretrained), load_iteration, seq_length."""

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
            if opened is not None:
                self.model = opened
                return
            if (checkpoint := load or pretrained) is None:
                raise ValueError("--model_args needs load=CKPT, the directory of a checkpoint")
            gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
            self.model = open_likelihoods(
                checkpoint,
                Mesh.single(),
                iteration=load_iteration,
                seq_length=seq_length,
                micro_batch_size=int(str(batch_size)) if str(batch_size).isdigit() else DEFAULT_MICRO_BATCH_SIZE,
                device=choose_device(device, gpus),
            )

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """Return, for each request's context and continuation, log-probability and whether it is the most probable one."""
            return self.model.score_continuations([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            """Return the log-probability of each request's text."""
            return self.model.score_texts([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """Return the text that the model generates for each request's prompt."""
            return [generate_answer(self.model, *request.args) for request in requests]

        @property
        def tokenizer_name(self) -> str:
            """Digest of the tokenizer; the harness stores cached requests under it."""
            return self.model.tokenizer.digest()

    return MegatronLM


def generate_answer(model: Likelihoods, prompt: str, arguments: Mapping[str, Any]) -> str:
    """Return the generated text for one request of the harness.

    Args:
        model: model and tokenizer.
        prompt: text to continue.
        arguments: the request's generation arguments; greedy unless do_sample is true.
    """
    stops = arguments.get("until") or []
    limits = [arguments[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if arguments.get(name)]
    max_tokens = int(limits[0]) if limits else DEFAULT_MAX_TOKENS
    sampling = Sampling(temperature=0.0)
    if arguments.get("do_sample"):
        top_k, top_p = int(arguments.get("top_k", 0)), arguments.get("top_p", 0.0)
        sampling = Sampling(arguments.get("temperature", 1.0), top_k, top_p)
    return model.generate_until(prompt, [stops] if isinstance(stops, str) else list(stops), max_tokens, sampling)


def register(opened: Likelihoods | None = None) -> None:
    """Register the model "megatron" with lm_eval in this process; see `harness_model`. ImportError without the package."""
    from lm_eval.api.registry import register_model

    register_model(MODEL_NAME)(harness_model(opened))


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status."""
    parser = ToolParser(
        prog="python -m megatron.tasks.lm_eval",
        description="lm-evaluation-harness on a checkpoint of any layout",
        epilog="Other flags are passed to lm_eval: --tasks, --num_fewshot, --limit, --output_path, ...; see lm_eval --help.",
        allow_abbrev=False,
    )
    add_model_flags(parser)
    parser.add_argument("--seq-length", type=int, help="tokens that the model reads at once (default: all its positions)")
    size = DEFAULT_MICRO_BATCH_SIZE
    parser.add_argument("--micro-batch-size", type=int, default=size, help=f"texts in one forward pass (default {size})")
    args, harness_args = parse_once(parser.parse_known_args, argv)
    env = LaunchEnvironment()
    try:
        env = LaunchEnvironment.from_environ(os.environ)
        grid, device = choose_layout(args, env)
        if find_spec("lm_eval") is None:
            raise ValueError(f"lm-evaluation-harness is not installed: {install_command('lm_eval')}")
        find_checkpoint(
            Path(args.load),
            args.load_iteration,
            lambda line: print(f"note: {line}", file=sys.stderr) if env.rank == 0 else None,
        )
    except (ValueError, *INPUT_ERRORS) as error:
        return report_refusal(error, env)
    try:
        with job(env, timeout_minutes=TIMEOUT_MINUTES, explain=explain_refusal) as started:
            rank_device = device if env.world_size == 1 else started.device
            mesh = Mesh.build(grid, env.rank, started.timeout, watch=started.watch)
            run_on_ranks(args, harness_args, started, mesh, rank_device)
    except INPUT_ERRORS as error:
        return report_refusal(error, env)
    return 0


def explain_refusal(error: BaseException, where: str) -> str | None:
    """Return the message of an error in the user's input, which needs no traceback; None for any other error."""
    return str(error) if isinstance(error, INPUT_ERRORS) else None


def run_on_ranks(args: argparse.Namespace, harness_args: Sequence[str], started: Job, mesh: Mesh, device: torch.device) -> None:
    """Run lm_eval on rank 0, with the model on all ranks. Collective.

    Args:
        args: parsed flags of this program.
        harness_args: command-line arguments for lm_eval.
        started: the running job.
        mesh: mesh of the ranks that share the model.
        device: device of this rank.
    """
    model = open_likelihoods(
        args.load,
        mesh,
        iteration=args.load_iteration,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        device=device,
    )
    if mesh.world.size == 1:
        run_harness(model, args.load, harness_args)
    elif mesh.world.first:
        started.watch.doing("running lm-evaluation-harness")
        leader = LeaderModel(model.model, mesh.world)
        run_harness(Likelihoods(leader, model.tokenizer, model.seq_length, model.micro_batch_size), args.load, harness_args)
        leader.finish()
    else:
        started.watch.waiting("waiting for lm-evaluation-harness on rank 0")
        follow_leader(model.model, mesh.world)


def run_harness(model: Likelihoods, load: str, harness_args: Sequence[str]) -> None:
    """Run lm_eval's command line with an open model.

    Args:
        model: model and tokenizer.
        load: directory of checkpoints, which lm_eval records in its results.
        harness_args: command-line arguments for lm_eval.
    """
    from lm_eval.__main__ import cli_evaluate

    register(model)
    # lm_eval records --model_args in its results; their syntax does not allow a directory with some characters.
    model_args = [] if set(load) & set("=, ") else ["--model_args", f"load={load}"]
    sys.argv = ["lm_eval", "--model", MODEL_NAME, *model_args, *harness_args]
    try:
        cli_evaluate()
    except SystemExit as exit_request:
        if exit_request.code:
            raise


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
