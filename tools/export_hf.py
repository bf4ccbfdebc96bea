"""Export a checkpoint of any layout to a Hugging Face directory, and compare its logits with those of this framework's model.

    python tools/export_hf.py --load runs/gpt --output runs/gpt-hf

Needs no GPU and no torchrun. Exit status: 0 done; 1 the result is wrong (it is left as OUTPUT.failed), or transformers is
missing; 2 bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.launch.tool_parser import ToolParser, non_empty_path

TORCH_DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--load", type=non_empty_path, required=True, metavar="CKPT", help="directory of checkpoints, or one iter_ directory"
    )
    parser.add_argument(
        "--output", type=non_empty_path, required=True, metavar="DIR", help="the Hugging Face directory to write"
    )
    parser.add_argument("--load-iteration", type=int, metavar="N", help="which iteration of --load; default the latest")
    parser.add_argument(
        "--dtype",
        choices=sorted(TORCH_DTYPE_NAMES),
        help="dtype to write; default that of each saved tensor",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it is an earlier export")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not open the result with transformers")
    return parser.parse_args()


def main() -> int:
    """Run the tool, and return its exit status."""
    args = parse_arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"  # all files are local; transformers must not use the network

    import torch

    from megatron.checkpoint.layout import CheckpointError
    from megatron.data.errors import DataError
    from megatron.files.outputs import OutputError
    from megatron.interop.checked_export import ExportError, export_hf

    try:
        source = export_hf(
            args.load,
            args.output,
            iteration=args.load_iteration,
            dtype=getattr(torch, TORCH_DTYPE_NAMES[args.dtype]) if args.dtype else None,
            verify=args.verify,
            overwrite=args.overwrite,
        )
    except (OutputError, CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ExportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"exported {source} to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
