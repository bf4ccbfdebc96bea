"""Megatron-LM's own training checkpoint, GPT or BERT, cut over any number of ranks -> a checkpoint of ours, weights only.

    python tools/import_megatron.py --load megatron-lm-run --save runs/gpt
    torchrun --nproc_per_node 4 pretrain_gpt.py --load runs/gpt --finetune --use-checkpoint-args ...

The files do not say how many rows of the vocabulary are padding: give the tokenizer, which is then kept with the weights, or
--vocab-size N, the number of its tokens. Nothing in the files is run. Exit status: 0 done; 2 bad input; 1 a failure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # this checkout, also where it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.data.tokenizer_flags import add_tokenizer_flags, tokenizer_config
    from megatron.launch.tool_parser import ToolParser, non_empty_path


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--load", type=non_empty_path, required=True, metavar="DIR", help="what --save was there, or its iter_ directory"
    )
    parser.add_argument(
        "--save", type=non_empty_path, required=True, metavar="CKPT", help="directory of checkpoints to write into"
    )
    add_tokenizer_flags(parser)
    return parser.parse_args()


def main() -> int:
    """Run the tool, and return its exit status."""
    given = parse_arguments()

    from megatron.checkpoint.layout import CheckpointError
    from megatron.data.errors import DataError
    from megatron.files.outputs import OutputError, check_folder
    from megatron.interop.checked_import import tokenizer_from_flags, write_imported
    from megatron.interop.megatron_files import read_megatron

    try:
        tokenizer, vocab_size = tokenizer_from_flags(tokenizer_config(given))
        # Of a single iteration the directory above it is Megatron-LM's as well.
        single = given.load.name == "release" or given.load.name.startswith("iter_")
        check_folder("--save", given.save, [given.load, *([given.load.parent] if single else [])])
        found = read_megatron(given.load, vocab_size)
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
        made = write_imported(given.save, found.config, found.weights, tokenizer, found.iteration)
    except (OutputError, CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    count = sum(tensor.numel() for tensor in found.weights.values())
    kind = found.config.architecture.upper()
    print(f"imported {found.directory} to {made}: a {kind} of {count:,} parameters, {found.config.vocab_size} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
