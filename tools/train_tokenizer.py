#!/usr/bin/env python
"""Train a tokenizer on text: byte-level BPE of GPT-2's kind (tokenizer.json, vocab.json, merges.txt), or BERT's (vocab.txt)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.data.errors import DataError
    from megatron.data.train_bpe import train_bpe
    from megatron.data.train_wordpiece import train_wordpiece
    from megatron.files.outputs import OutputError
    from megatron.launch.tool_parser import ToolParser, non_empty_name

OUTPUT_FILES = {  # by --tokenizer-type
    "GPT2BPETokenizer": "tokenizer.json, vocab.json and merges.txt",
    "BertWordPieceLowerCase": "vocab.txt",
    "BertWordPieceCase": "vocab.txt",
}


def main(argv: list[str] | None = None) -> int:
    """Run the tool, and return its exit status."""
    parser = ToolParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--input",
        type=non_empty_name,
        required=True,
        nargs="+",
        metavar="FILE",
        help="JSON lines, or plain text as .txt; also compressed (gzip, zstandard, bzip2, xz)",
    )
    parser.add_argument(
        "--json-keys", "--json-key", nargs="+", default=["text"], metavar="KEY", help="keys of the JSON objects to read"
    )
    parser.add_argument(
        "--tokenizer-type",
        choices=list(OUTPUT_FILES),
        default="GPT2BPETokenizer",
        help="kind of tokenizer (default GPT2BPETokenizer)",
    )
    parser.add_argument(
        "--vocab-size",
        required=True,
        type=int,
        help="ids, including the 256 bytes and <|endoftext|>, or BERT's special tokens",
    )
    parser.add_argument("--output", type=non_empty_name, required=True, metavar="DIR", help="directory for the files")
    args = parser.parse_args(argv)
    if args.tokenizer_type == "GPT2BPETokenizer":
        size = train_bpe(args.input, args.json_keys, args.vocab_size, args.output)
    else:
        lower_case = args.tokenizer_type == "BertWordPieceLowerCase"
        size = train_wordpiece(args.input, args.json_keys, args.vocab_size, args.output, lower_case=lower_case)
    if size < args.vocab_size:
        print(f"warning: the text gives only {size} of {args.vocab_size} ids", file=sys.stderr)
    print(f"{args.output}: {OUTPUT_FILES[args.tokenizer_type]} with {size} ids")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, wrong=(DataError, OutputError), failed=OSError))
