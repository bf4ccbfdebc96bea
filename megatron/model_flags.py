"""The flags of tools that open a trained model, in one process or cut over several."""

from __future__ import annotations

import argparse

import torch

from megatron.generate import device_of
from megatron.mesh.grid import Grid
from megatron.mesh.place import Place


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, on which device, over how many processes."""
    parser.add_argument("--load", required=True, help="directory of checkpoints, or one iter_ directory")
    parser.add_argument("--load-iteration", type=int, help="which iteration of --load; default the latest")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default cuda where there is one, else cpu")
    for axis, what in (("tensor", "each layer"), ("pipeline", "the depth")):
        parser.add_argument(
            f"--{axis}-model-parallel-size", type=int, default=1, help=f"processes that share {what} (default 1)"
        )


def layout_of(args: argparse.Namespace, place: Place) -> tuple[Grid, torch.device]:
    """How the model is cut, and the device of a process that is alone; of several each has its own, see `Job`.

    ValueError for sizes whose product is not the number of processes, and for a device that is not there.
    """
    grid = Grid(tp=args.tensor_model_parallel_size, pp=args.pipeline_model_parallel_size)
    if args.device is not None and place.world_size > 1:
        raise ValueError(f"--device {args.device} is for one process; several each take the device of their own number")
    device = device_of(args.device, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    sizes = f"--tensor-model-parallel-size {grid.tp} x --pipeline-model-parallel-size {grid.pp}"
    if min(grid.shape) < 1:
        raise ValueError(f"{sizes}; legal: 1 and above")
    if grid.world_size != place.world_size:
        raise ValueError(
            f"{sizes} needs as many processes; there are {place.world_size}: "
            f"start with torchrun --nproc_per_node {grid.world_size}"
        )
    return grid, device
