"""Flags of the tools that open a trained model, in one process or divided over several."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import TypeVar

import torch

from megatron.inference.generate import choose_device
from megatron.launch.command_line import torchrun_command
from megatron.launch.entry import is_first_process
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.exit_report import let_rank_0_report, write_error_file
from megatron.launch.tool_parser import non_empty_name
from megatron.mesh.grid import Grid

T = TypeVar("T")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the checkpoint, the device and the number of processes."""
    parser.add_argument("--load", type=non_empty_name, required=True, help="directory of checkpoints, or one iter_ directory")
    parser.add_argument("--load-iteration", type=int, help="which iteration of --load; default the latest")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default cuda where there is one, else cpu")
    for axis, what in (("tensor", "each layer"), ("pipeline", "the depth")):
        parser.add_argument(
            f"--{axis}-model-parallel-size", type=int, default=1, help=f"processes that share {what} (default 1)"
        )


def parse_once(parse: Callable[[Sequence[str]], T], argv: Sequence[str]) -> T:
    """Return `parse(argv)`, a method of argparse; of several processes only the first prints help and mistakes."""
    if is_first_process():
        return parse(argv)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            return parse(argv)
    except SystemExit:
        let_rank_0_report(LaunchEnvironment(job=os.environ.get("TORCHELASTIC_RUN_ID")))
        raise


def report_refusal(error: Exception, env: LaunchEnvironment) -> int:
    """Report a mistake in the command once for all ranks, and return the exit status.

    Args:
        error: the mistake, found before the process group forms.
        env: the launcher's description of this process.
    """
    if env.rank == 0:
        write_error_file(f"error: {error}")
    else:
        let_rank_0_report(env)  # under torchrun, which ends this process meanwhile, it does not return
    if env.local_rank == 0 or getattr(error, "own", False):
        print(f"error: {error}", file=sys.stderr)
    return 2


def choose_layout(args: argparse.Namespace, env: LaunchEnvironment) -> tuple[Grid, torch.device]:
    """Choose the grid that the model is divided over, and the device of a single process; for several, `Job` has the device.

    Args:
        args: the parsed flags of `add_model_flags`.
        env: the launcher's description of this process.

    Raises:
        ValueError: the product of the sizes is not the number of processes, or there is no such device.
    """
    grid = Grid(tp=args.tensor_model_parallel_size, pp=args.pipeline_model_parallel_size)
    if args.device is not None and env.world_size > 1:
        raise ValueError(f"--device {args.device} is for one process; several each take the device of their own number")
    device = choose_device(args.device, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    sizes = f"--tensor-model-parallel-size {grid.tp} x --pipeline-model-parallel-size {grid.pp}"
    if min(grid.shape) < 1:
        raise ValueError(f"{sizes}; legal: 1 and above")
    if grid.world_size != env.world_size:
        command = torchrun_command(grid.world_size, os.path.relpath(sys.argv[0]), sys.argv[1:])
        whole_command = f": {shlex.join(command)}" if env.launcher == "python" else ""
        raise ValueError(
            f"{sizes} needs as many processes; there are {env.world_size}: "
            f"start with torchrun --nproc_per_node {grid.world_size}{whole_command}"
        )
    return grid, device
