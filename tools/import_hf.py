"""A Hugging Face directory, GPT-2, Llama's family or MegatronBert -> a checkpoint of ours, weights only, with the tokenizer.

    python tools/import_hf.py --input gpt2-medium --save runs/gpt
    torchrun --nproc_per_node 4 pretrain_gpt.py --load runs/gpt --finetune --use-checkpoint-args ...

Reads config.json and safetensors; pickled weights (.bin) are refused. Exit status: 0 done; 2 bad input; 1 a failure.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="the Hugging Face directory")
    parser.add_argument("--save", type=Path, required=True, metavar="CKPT", help="directory of checkpoints to write into")
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="keep the first N rows of the vocabulary, where more are padding; default all",
    )
    return parser.parse_args()


def main() -> int:
    given = arguments()

    from megatron.checkpoint.from_hf import read_hf
    from megatron.checkpoint.layout import CheckpointError
    from megatron.checkpoint.megatron_lm import unpadded
    from megatron.data.errors import DataError
    from megatron.files.outputs import BadOutput, check_folder
    from megatron.imports import store, tokenizer_in

    try:
        check_folder("--save", given.save, [given.input])
        config, weights = read_hf(given.input)
        tokenizer = tokenizer_in(given.input)
        if given.vocab_size is not None:
            config, weights = replace(config, vocab_size=given.vocab_size), unpadded(weights, given.vocab_size)
        made = store(given.save, config, weights, tokenizer)
    except (BadOutput, CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if tokenizer is None:
        print("note: there is no tokenizer.json, so the checkpoint has no tokenizer", file=sys.stderr)
    elif tokenizer.vocab_size != config.vocab_size:
        print(
            f"note: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; to train on with this "
            f"tokenizer, import with --vocab-size {tokenizer.vocab_size}",
            file=sys.stderr,
        )
    print(f"imported {given.input} to {made}: {sum(t.numel() for t in weights.values()):,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
