"""Import the weights of a GPT or BERT checkpoint of Megatron-LM, sharded over any number of ranks.

    python tools/import_megatron.py --load megatron-lm-run --save runs/gpt
    torchrun --nproc_per_node 4 pretrain_gpt.py --load runs/gpt --finetune --use-checkpoint-args ...

The files do not tell how many rows of the vocabulary are padding: give the tokenizer, which is then stored in the checkpoint,
or --vocab-size N, the number of its tokens. No code from the files is executed. Exit status: 0 done; 2 bad input; 1 a failure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.data.tokenizer_flags import add_tokenizer_flags, tokenizer_config
    from megatron.launch.tool_parser import ToolParser, non_empty_path


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--load",
        type=non_empty_path,
        required=True,
        metavar="DIR",
        help="Megatron-LM's --save directory, or an iter_ directory in it",
    )
    parser.add_argument(
        "--save", type=non_empty_path, required=True, metavar="CKPT", help="directory of checkpoints to write into"
    )
    add_tokenizer_flags(parser)
    return parser.parse_args()


def main() -> int:
    """Run the tool, and return its exit status."""
    args = parse_arguments()

    from megatron.checkpoint.layout import CheckpointError
    from megatron.data.errors import DataError
    from megatron.files.outputs import OutputError, check_folder
    from megatron.interop.checked_import import tokenizer_from_flags, write_imported
    from megatron.interop.megatron_files import read_megatron

    try:
        tokenizer, vocab_size = tokenizer_from_flags(tokenizer_config(args))
        # The parent of a single iteration's directory belongs to Megatron-LM as well, so it must not be the output either.
        is_iteration = args.load.name == "release" or args.load.name.startswith("iter_")
        check_folder("--save", args.save, [args.load, *([args.load.parent] if is_iteration else [])])
        imported = read_megatron(args.load, vocab_size)
        for note in imported.notes:
            print(f"note: {note}", file=sys.stderr)
        written = write_imported(args.save, imported.config, imported.weights, tokenizer, imported.iteration)
    except (OutputError, CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    count = sum(tensor.numel() for tensor in imported.weights.values())
    kind = imported.config.architecture.upper()
    print(f"imported {imported.directory} to {written}: a {kind} of {count:,} parameters, {imported.config.vocab_size} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
