r"""Run lm-evaluation-harness (the package lm_eval, arXiv 2405.14782) on a checkpoint of any layout, without converting it.

    python -m megatron.tasks.lm_eval --load CKPT --tasks hellaswag --num_fewshot 5 --output_path results
    torchrun --nproc_per_node 4 -m megatron.tasks.lm_eval --load CKPT \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --tasks hellaswag

All flags that this program does not know are passed to lm_eval's command line; --output_path writes its JSON. In Python, after
`register()`, the model is called "megatron": `lm_eval.simple_evaluate(model="megatron", model_args="load=CKPT", tasks=[...])`.
Needs `pip install -e '.[eval]'`. On several processes, the first one runs lm_eval, and the others compute their parts of the
model.
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

NAME = "megatron"
DEFAULT_MICRO_BATCH = 8
DEFAULT_TOKENS = 256  # maximum length of a generated text: the harness's own default
TIMEOUT_MINUTES = 24 * 60.0  # the other processes wait while the first one reads data sets and computes metrics
INPUT_ERRORS = (CheckpointError, ConfigError, DataError)  # mistakes of the user, reported without a traceback


def open_likelihoods(
    load: Path | str,
    mesh: Mesh,
    *,
    iteration: int | None = None,
    seq_length: int | None = None,
    micro_batch_size: int = DEFAULT_MICRO_BATCH,
    device: torch.device | str = "cpu",
) -> Likelihoods:
    """Open a checkpoint for scoring. Collective.

    Args:
        load: directory of checkpoints.
        mesh: the ranks that share the model.
        iteration: iteration of the checkpoint; None for the newest.
        seq_length: tokens that the model reads at once; None for its maximum.
        micro_batch_size: number of windows in one forward pass.
        device: this rank's device.

    Raises:
        CheckpointError, ConfigError, DataError: the checkpoint cannot be scored.
    """
    opened = open_pipeline(load, mesh, iteration=iteration, device=device)
    length = seq_length or opened.config.max_position_embeddings
    check_scoring_sizes(opened, length, length, micro_batch_size)
    return Likelihoods(opened.model, require_tokenizer(opened), length, micro_batch_size)


def harness_model(ready: Likelihoods | None = None) -> type[Any]:
    """Return a model class of the harness for our checkpoints. ready: an open model to use instead of the arguments' one."""
    from lm_eval.api.model import LM

    class MegatronLM(LM):  # type: ignore[misc, unused-ignore]
        """A checkpoint as a model of the harness. The model_args are load (or pretrained), load_iteration and seq_length."""

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
            self.model = open_likelihoods(
                checkpoint,
                Mesh.single(),
                iteration=load_iteration,
                seq_length=seq_length,
                micro_batch_size=int(str(batch_size)) if str(batch_size).isdigit() else DEFAULT_MICRO_BATCH,
                device=choose_device(device, gpus),
            )

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """Score continuations of contexts."""
            return self.model.score_continuations([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            """Score whole texts."""
            return self.model.score_texts([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """Write texts after prompts."""
            return [generate_answer(self.model, *request.args) for request in requests]

        @property
        def tokenizer_name(self) -> str:
            """A name for the tokenizer, by which the harness caches requests."""
            return self.model.tokenizer.digest()

    return MegatronLM


def generate_answer(model: Likelihoods, prompt: str, asked: Mapping[str, Any]) -> str:
    """Return the text for one request of the harness.

    Args:
        model: generates the text.
        prompt: the prompt.
        asked: the generation arguments of the request; greedy unless do_sample is true.
    """
    until = asked.get("until") or []
    max_tokens = next(
        (int(asked[name]) for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if asked.get(name)), DEFAULT_TOKENS
    )
    sampling = Sampling(temperature=0.0)
    if asked.get("do_sample"):
        sampling = Sampling(asked.get("temperature", 1.0), int(asked.get("top_k", 0)), asked.get("top_p", 0.0))
    return model.generate_until(prompt, [until] if isinstance(until, str) else list(until), max_tokens, sampling)


def register(ready: Likelihoods | None = None) -> None:
    """Register the model "megatron" with lm_eval in this process. ImportError without the package."""
    from lm_eval.api.registry import register_model

    register_model(NAME)(harness_model(ready))


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status."""
    parser = ToolParser(
        prog="python -m megatron.tasks.lm_eval",
        description="lm-evaluation-harness on a checkpoint of any layout",
        epilog="Everything else goes to lm_eval: --tasks, --num_fewshot, --limit, --output_path, ...; see lm_eval --help.",
        allow_abbrev=False,
    )
    add_model_flags(parser)
    parser.add_argument("--seq-length", type=int, help="tokens that the model sees at once; default all its positions")
    parser.add_argument(
        "--micro-batch-size", type=int, default=DEFAULT_MICRO_BATCH, help=f"texts in one pass (default {DEFAULT_MICRO_BATCH})"
    )
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
            own = device if env.world_size == 1 else started.device
            mesh = Mesh.build(grid, env.rank, started.timeout, watch=started.watch)
            run_on_ranks(args, harness_args, started, mesh, own)
    except INPUT_ERRORS as error:
        return report_refusal(error, env)
    return 0


def explain_refusal(error: BaseException, where: str) -> str | None:
    """Return the message of a mistake of the user, which needs no traceback; None for any other error."""
    return str(error) if isinstance(error, INPUT_ERRORS) else None


def run_on_ranks(args: argparse.Namespace, harness_args: Sequence[str], started: Job, mesh: Mesh, device: torch.device) -> None:
    """Run lm_eval on the first process, with a model on all of them. Collective.

    Args:
        args: the parsed flags of this program.
        harness_args: the words of the command line that are passed to lm_eval.
        started: the job.
        mesh: the parallel axes.
        device: this rank's device.
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
        started.watch.waiting("lm-evaluation-harness on the first process")
        follow_leader(model.model, mesh.world)


def run_harness(model: Likelihoods, load: str, harness_args: Sequence[str]) -> None:
    """Run lm_eval's own command line with a model.

    Args:
        model: the model that answers the harness's requests.
        load: directory of the checkpoint, for the results.
        harness_args: the words of the command line.
    """
    from lm_eval.__main__ import cli_evaluate

    register(model)
    # The results name the checkpoint by --model_args, whose syntax does not allow some characters.
    model_args = [] if set(load) & set("=, ") else ["--model_args", f"load={load}"]
    sys.argv = ["lm_eval", "--model", NAME, *model_args, *harness_args]
    try:
        cli_evaluate()
    except SystemExit as ended:
        if ended.code:
            raise


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
