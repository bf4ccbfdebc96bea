#!/usr/bin/env python
"""Train a byte-level BPE tokenizer (GPT-2's kind) on text: tokenizer.json, and vocab.json with merges.txt."""

from __future__ import annotations

import argparse
import sys

from megatron.data.errors import DataError
from megatron.data.train_bpe import train_bpe


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument(
        "--input", required=True, nargs="+", metavar="FILE", help="JSON lines, plain, .gz or .zst; or plain text as .txt"
    )
    p.add_argument(
        "--json-keys", "--json-key", nargs="+", default=["text"], metavar="KEY", help="keys of the JSON objects to read"
    )
    p.add_argument("--vocab-size", required=True, type=int, help="ids, with the 256 bytes and <|endoftext|>")
    p.add_argument("--output", required=True, metavar="DIR", help="directory for the files")
    args = p.parse_args(argv)
    size = train_bpe(args.input, args.json_keys, args.vocab_size, args.output)
    if size < args.vocab_size:
        print(f"warning: the text gives only {size} of {args.vocab_size} ids", file=sys.stderr)
    print(f"{args.output}: tokenizer.json, vocab.json and merges.txt with {size} ids")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
