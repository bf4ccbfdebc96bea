#!/usr/bin/env python
"""Tokenize JSON lines into indexed datasets: PREFIX_text_document.bin and .idx, in Megatron-LM's format."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.config.schema import TokenizerConfig
    from megatron.data.encode import PreprocessConfig
    from megatron.data.errors import DataError
    from megatron.data.preprocess import PreprocessTotals, preprocess
    from megatron.data.tokenizer_flags import add_tokenizer_flags, tokenizer_config
    from megatron.files.outputs import OutputError
    from megatron.launch.tool_parser import ToolParser, non_empty_name


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--input",
        type=non_empty_name,
        required=True,
        nargs="+",
        metavar="FILE",
        help="JSON lines, plain or compressed (gzip, zstandard, bzip2, xz); glob patterns, too",
    )
    parser.add_argument("--output-prefix", type=non_empty_name, required=True, help="output path, without .bin and .idx")
    parser.add_argument(
        "--json-keys",
        "--json-key",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys to read, each to its own dataset",
    )
    add_tokenizer_flags(parser)
    parser.add_argument("--append-eod", action="store_true", help="end each document with the tokenizer's end of document")
    parser.add_argument(
        "--special-tokens-in-text",
        choices=("ids", "plain"),
        default="ids",
        help="ids: a special token in a text, such as <|endoftext|>, gets its id; plain: it is tokenized as ordinary text",
    )
    parser.add_argument("--split-sentences", action="store_true", help="store one sequence per sentence, as BERT needs")
    parser.add_argument(
        "--keep-newlines", action="store_true", help="with --split-sentences, keep the white space between sentences"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize; the output is the same for any number")
    parser.add_argument(
        "--on-bad-line",
        choices=("error", "skip"),
        default="error",
        help="what to do with a line that is not a JSON object with text under each key, or whose text the tokenizer refuses; "
        "skip: count it, and write it to PREFIX.bad.jsonl",
    )
    parser.add_argument("--log-interval", type=int, default=1000, help="documents between progress lines")
    parser.add_argument("--partitions", type=int, default=1, help="accepted for Megatron-LM's scripts; only 1")
    parser.add_argument("--dataset-impl", choices=("mmap",), default="mmap", help="accepted for Megatron-LM's scripts")
    parser.add_argument(
        "--lang", default="english", help="accepted for Megatron-LM's scripts; the sentence rules are for English"
    )
    return parser


class Progress:
    """Prints progress to standard error every `interval` documents; on a terminal, each line overwrites the last one."""

    def __init__(self, interval: int) -> None:
        self.interval, self.next, self.on_terminal = max(interval, 1), max(interval, 1), sys.stderr.isatty()

    def __call__(self, totals: PreprocessTotals) -> None:
        if totals.documents < self.next:
            return
        self.next = totals.documents - totals.documents % self.interval + self.interval  # documents are reported in batches
        rate, mb = totals.documents / max(totals.seconds, 1e-9), totals.size / max(totals.seconds, 1e-9) / 1e6
        line = f"Processed {totals.documents} documents ({rate:.1f} docs/s, {mb:.2f} MB/s)."
        print(
            f"\r{line}\033[K" if self.on_terminal else line, end="" if self.on_terminal else "\n", file=sys.stderr, flush=True
        )

    def end(self) -> None:
        """End the progress line on a terminal, so that later output does not overwrite it."""
        if self.on_terminal:
            print(file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the tool, and return its exit status."""
    args = build_parser().parse_args(argv)
    if args.partitions != 1:
        raise DataError("--partitions: only 1; use --workers, which needs no partitions")
    if args.workers < 1:
        raise DataError(f"--workers {args.workers}: at least 1")
    config: TokenizerConfig = tokenizer_config(args)
    settings = PreprocessConfig(
        tokenizer=config,
        keys=tuple(args.json_keys),
        append_eod=args.append_eod,
        plain_special_tokens=args.special_tokens_in_text == "plain",
        split_sentences=args.split_sentences,
        keep_newlines=args.keep_newlines,
        skip_bad_lines=args.on_bad_line == "skip",
    )
    progress = Progress(args.log_interval)
    try:
        totals = preprocess(args.input, args.output_prefix, settings, args.workers, progress, print)
    finally:
        progress.end()
    for prefix in totals.prefixes:
        print(f"wrote {prefix}.bin, {prefix}.idx")
    counts = f"{totals.documents} documents, {totals.tokens} tokens, {totals.empty} empty, {totals.bad} bad lines"
    print(f"{counts}, {totals.seconds:.1f} s")
    if not args.append_eod and not args.split_sentences:
        print(
            f"warning: no end-of-document tokens in these {totals.documents} documents; for GPT add --append-eod",
            file=sys.stderr,
        )
    return 0


def raise_interrupt(number: int, _: object) -> None:
    """Handle SIGTERM like Ctrl-C, so that temporary files are removed."""
    raise KeyboardInterrupt(number)


def run_tool() -> int:
    """Run the tool and return its exit status; report errors in one line."""
    try:
        return main()
    except (DataError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, raise_interrupt)
    sys.exit(run_main(run_tool))
