"""Write text with a trained model: `tools/generate.py --load CKPT --prompt TEXT`.

Opens a checkpoint of any layout. The architecture and the tokenizer come from the checkpoint. Started by torchrun on several
processes, it cuts the model over them: --tensor-model-parallel-size x --pipeline-model-parallel-size must be their number.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from megatron.checkpoint.layout import CheckpointError, find
from megatron.config.errors import ConfigError
from megatron.data.errors import DataError
from megatron.generate import Sampling, device_of, generate, room_after
from megatron.mesh.grid import Grid
from megatron.mesh.launch import Job, job
from megatron.mesh.mesh import Mesh
from megatron.mesh.place import Place
from megatron.restore import open_pipeline

REFUSED = (CheckpointError, ConfigError, DataError, ValueError)  # what was asked for cannot be done; needs no traceback


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--load", required=True, help="directory of checkpoints, or one iter_ directory")
    parser.add_argument("--load-iteration", type=int, help="which iteration of --load; default the latest")
    parser.add_argument("--prompt", required=True, help="text to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to write (default 64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable token (default 1)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k most probable tokens; 0 is all")
    parser.add_argument("--top-p", type=float, default=0.0, help="choose among the fewest tokens of this probability; 0 is all")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default 0)")
    parser.add_argument("--no-cache", action="store_true", help="compute keys and values again for each token")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default cuda where there is one, else cpu")
    for axis, what in (("tensor", "each layer"), ("pipeline", "the depth")):
        parser.add_argument(
            f"--{axis}-model-parallel-size", type=int, default=1, help=f"processes that share {what} (default 1)"
        )
    args = parser.parse_args(argv)
    grid = Grid(tp=args.tensor_model_parallel_size, pp=args.pipeline_model_parallel_size)
    speaks = True
    try:
        place = Place.of(os.environ)
        speaks = place.rank == 0
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if args.device is not None and place.world_size > 1:
            raise ValueError(f"--device {args.device} is for one process; several each take the device of their own number")
        device = device_of(args.device, gpus)
        sampling = Sampling(args.temperature, args.top_k, args.top_p)
        if args.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {args.max_new_tokens} writes nothing; legal: 1 and above")
        sizes = f"--tensor-model-parallel-size {grid.tp} x --pipeline-model-parallel-size {grid.pp}"
        if min(grid.shape) < 1:
            raise ValueError(f"{sizes}; legal: 1 and above")
        if grid.world_size != place.world_size:
            raise ValueError(
                f"{sizes} needs as many processes; there are {place.world_size}: "
                f"start with torchrun --nproc_per_node {grid.world_size}"
            )
        find(Path(args.load), args.load_iteration)
        with job(place, explain=lambda error, where: str(error) if isinstance(error, REFUSED) else None) as started:
            text, note = write(args, started, grid, device if place.world_size == 1 else started.device, sampling)
    except REFUSED as error:
        if speaks:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if speaks:
        print(note, end="", file=sys.stderr)
        print(text)
    return 0


def write(args: argparse.Namespace, started: Job, grid: Grid, device: torch.device, sampling: Sampling) -> tuple[str, str]:
    """The prompt with what the model adds, and what there is to say about it. Collective."""
    mesh = Mesh.build(grid, started.place.rank, started.timeout)
    opened = open_pipeline(args.load, mesh, iteration=args.load_iteration, device=device)
    if opened.config.architecture != "gpt":
        raise DataError(f"{opened.directory} holds a BERT, which fills in masked words and does not go on with a text")
    if opened.tokenizer is None:
        raise DataError(f"{opened.directory} holds no tokenizer: it was not saved by a pretraining run")
    prompt = opened.tokenizer.tokenize(args.prompt)
    tokens = list(
        generate(
            opened.model,
            prompt,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
            seed=args.seed,
            stop=opened.tokenizer.special.get("eod"),
            use_cache=not args.no_cache,
        )
    )
    room, note = room_after(opened.model, prompt), ""
    if room is not None and len(tokens) == room < args.max_new_tokens:
        note = (
            f"note: --max-new-tokens {args.max_new_tokens} was cut to {room}: the model ends at position "
            f"{len(prompt) + room}, and the prompt takes {len(prompt)}\n"
        )
    return opened.tokenizer.detokenize([*prompt, *tokens]), note


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
