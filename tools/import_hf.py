"""A Hugging Face directory, GPT-2, Llama's family or MegatronBert -> a checkpoint of ours, weights only, with the tokenizer.

    python tools/import_hf.py --input gpt2-medium --save runs/gpt
    torchrun --nproc_per_node 4 pretrain_gpt.py --load runs/gpt --finetune --use-checkpoint-args ...

Reads config.json and safetensors; pickled weights (.bin) are refused. Where transformers is installed, it opens the same
directory, and the logits of both models are compared. Exit status: 0 done; 2 bad input; 1 a failure, or logits that differ.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # this checkout, also where it is not installed

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
        help="rows of the vocabulary: the first N, where more are padding, or all and new ones, each the mean of those that "
        "are there, so that new tokens can be trained; default all that are there",
    )
    parser.add_argument(
        "--no-tokenizer", dest="tokenizer", action="store_false", help="import the weights without the directory's tokenizer"
    )
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not compare the logits with those of transformers"
    )
    return parser.parse_args()


def print_note(line: str) -> None:
    """Print a line that is no error to standard error."""
    print(f"note: {line}", file=sys.stderr)


def main() -> int:
    """Run the tool, and return its exit status."""
    given = parse_arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; transformers must not look further

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
        check_folder("--save", given.save, [given.input])
        check_save_root(given.save, 0)  # before the work, not after it
        config, weights = read_hf(given.input, say=print_note)
        check_weights(config, weights)
        tokenizer = import_tokenizer(given.input, print_note) if given.tokenizer else None
        print(
            compare_with_source(given.input, config, weights)
            if given.verify
            else "not compared with transformers (--no-verify)"
        )
        if given.vocab_size is not None:
            config, weights = replace(config, vocab_size=given.vocab_size), resize_vocabulary(weights, given.vocab_size)
        kept = read_side_files(given.input, tokenizer=tokenizer is not None)
        made = write_imported(given.save, config, weights, tokenizer, kept=kept)
    except (OutputError, CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except LogitsError as error:
        print(f"error: {given.input}: {error}; --no-verify imports it without this comparison", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if tokenizer is not None:
        if line := vocabulary_mismatch(config, tokenizer):
            print_note(line)
    elif given.tokenizer:
        print_note("there are no files of a tokenizer that is known, so the checkpoint has no tokenizer")
    print(f"imported {given.input} to {made}: {sum(t.numel() for t in weights.values()):,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
