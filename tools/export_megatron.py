r"""Export the weights of a checkpoint of any layout to Megatron-LM's files, sharded over any number of ranks.

    python tools/export_megatron.py --load runs/gpt --save megatron-lm-run \
        --target-tensor-parallel-size 2 --target-pipeline-parallel-size 2

Megatron-LM loads it with --finetune, or with --no-load-optim --no-load-rng. Exit status: 0 done; 2 bad input; 1 a failure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.launch.tool_parser import ToolParser, non_empty_path


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--load", type=non_empty_path, required=True, metavar="CKPT", help="directory of checkpoints, or one iter_ directory"
    )
    parser.add_argument(
        "--save", type=non_empty_path, required=True, metavar="DIR", help="directory for Megatron-LM's checkpoints"
    )
    parser.add_argument("--load-iteration", type=int, metavar="N", help="which iteration of --load; default the latest")
    for axis in ("tensor", "pipeline"):
        parser.add_argument(
            f"--target-{axis}-parallel-size",
            type=int,
            default=1,
            metavar="N",
            help=f"{axis}-parallel ranks of the export",
        )
    return parser.parse_args()


def main() -> int:
    """Run the tool, and return its exit status."""
    args = parse_arguments()

    from megatron.checkpoint.find import find_checkpoint
    from megatron.checkpoint.layout import CheckpointError, read_manifest
    from megatron.checkpoint.model_config import read_model_config
    from megatron.checkpoint.tokenizer import open_tokenizer
    from megatron.data.errors import DataError
    from megatron.files.outputs import OutputError, check_folder
    from megatron.interop.megatron_files import write_megatron
    from megatron.interop.whole_tensors import read_weights

    try:
        directory = find_checkpoint(args.load, args.load_iteration, lambda line: print(f"note: {line}", file=sys.stderr))
        check_folder("--save", args.save, [args.load, directory, directory.parent])
        tokenizer, config = open_tokenizer(directory), read_model_config(directory)
        written = write_megatron(
            args.save,
            read_manifest(directory).iteration,
            config,
            read_weights(directory),
            tp=args.target_tensor_parallel_size,
            pp=args.target_pipeline_parallel_size,
            tokenizer_type=tokenizer.kind if tokenizer else None,
        )
    except (OutputError, CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # Megatron-LM's BertLMHead uses torch's exact GELU, although the fused kernel in its layers uses the tanh approximation.
    if config.architecture == "bert" and config.activation == "gelu":
        note = "Megatron-LM's masked-word head uses the exact GELU, ours the tanh approximation: give Megatron-LM --openai-gelu"
        print(f"note: {note}", file=sys.stderr)
    print(f"exported {directory} to {written}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
