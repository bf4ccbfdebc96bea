"""Import the weights and the tokenizer of a Hugging Face directory (GPT-2, Llama's family or MegatronBert) as a checkpoint.

    python tools/import_hf.py --input gpt2-medium --save runs/gpt
    torchrun --nproc_per_node 4 pretrain_gpt.py --load runs/gpt --finetune --use-checkpoint-args ...

Reads config.json and safetensors; pickled weights (.bin) are refused. If transformers is installed, the logits of its model
and of the imported one are compared. Exit status: 0 done; 2 bad input; 1 a failure, or the logits differ.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.launch.tool_parser import ToolParser, non_empty_path


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=non_empty_path, required=True, metavar="DIR", help="the Hugging Face directory")
    parser.add_argument(
        "--save", type=non_empty_path, required=True, metavar="CKPT", help="directory of checkpoints to write into"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="vocabulary rows of the checkpoint: fewer than in the directory drops the last ones (padding), more adds rows for "
        "new tokens, each the mean of the existing ones; default as in the directory",
    )
    parser.add_argument(
        "--no-tokenizer", dest="tokenizer", action="store_false", help="import the weights without the directory's tokenizer"
    )
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not compare the logits with those of transformers"
    )
    return parser.parse_args()


def print_note(line: str) -> None:
    """Print a note for the user to standard error."""
    print(f"note: {line}", file=sys.stderr)


def main() -> int:
    """Run the tool, and return its exit status."""
    args = parse_arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"  # all files are local; transformers must not use the network

    from megatron.checkpoint.layout import CheckpointError
    from megatron.data.errors import DataError
    from megatron.files.outputs import OutputError, check_folder
    from megatron.interop.checked_import import check_weights, vocabulary_mismatch, write_imported
    from megatron.interop.compare_logits import LogitsError, compare_with_source
    from megatron.interop.hf_import import read_hf
    from megatron.interop.hf_tokenizers import import_tokenizer
    from megatron.interop.megatron_tensors import resize_vocabulary
    from megatron.interop.side_files import read_side_files
    from megatron.interop.whole_tensors import check_save_root

    try:
        check_folder("--save", args.save, [args.input])
        check_save_root(args.save, 0)  # fail before the import, not after it
        config, weights = read_hf(args.input, say=print_note)
        check_weights(config, weights)
        tokenizer = import_tokenizer(args.input, print_note) if args.tokenizer else None
        print(
            compare_with_source(args.input, config, weights) if args.verify else "not compared with transformers (--no-verify)"
        )
        if args.vocab_size is not None:
            config, weights = replace(config, vocab_size=args.vocab_size), resize_vocabulary(weights, args.vocab_size)
        side_files = read_side_files(args.input, tokenizer=tokenizer is not None)
        written = write_imported(args.save, config, weights, tokenizer, kept=side_files)
    except (OutputError, CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except LogitsError as error:
        print(f"error: {args.input}: {error}; --no-verify imports it without this comparison", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if tokenizer is not None:
        if line := vocabulary_mismatch(config, tokenizer):
            print_note(line)
    elif args.tokenizer:
        print_note("the directory has no files of a known tokenizer, so the checkpoint has no tokenizer")
    print(f"imported {args.input} to {written}: {sum(t.numel() for t in weights.values()):,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
