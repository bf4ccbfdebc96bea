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
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not compare the logits with those of transformers"
    )
    return parser.parse_args()


def main() -> int:
    given = arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; transformers must not look further

    from megatron.checkpoint.from_hf import read_hf
    from megatron.checkpoint.layout import CheckpointError
    from megatron.checkpoint.megatron_lm import unpadded
    from megatron.data.errors import DataError
    from megatron.imports import compare, store, tokenizer_in
    from megatron.logits import LogitsError, compared_with_source

    try:
        config, weights = read_hf(given.input, say=lambda line: print(f"note: {line}", file=sys.stderr))
        compare(config, weights)
        print(
            compared_with_source(given.input, config, weights)
            if given.verify
            else "not compared with transformers (--no-verify)"
        )
        tokenizer = tokenizer_in(given.input)
        if given.vocab_size is not None:
            config, weights = replace(config, vocab_size=given.vocab_size), unpadded(weights, given.vocab_size)
        made = store(given.save, config, weights, tokenizer)
    except (CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except LogitsError as error:
        print(f"error: {given.input}: {error}; --no-verify imports it without this comparison", file=sys.stderr)
        return 1
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
