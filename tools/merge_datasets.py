#!/usr/bin/env python
"""Concatenate indexed datasets, in the given order, into one."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.data.errors import DataError
    from megatron.data.merge import find_prefixes, merge_datasets
    from megatron.files.outputs import OutputError
    from megatron.launch.tool_parser import ToolParser, non_empty_name


def main(argv: list[str] | None = None) -> int:
    """Run the tool, and return its exit status."""
    parser = ToolParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--input",
        type=non_empty_name,
        required=True,
        nargs="+",
        metavar="DIR_OR_PREFIX",
        help="prefixes, or a directory for all datasets in it",
    )
    parser.add_argument("--output-prefix", type=non_empty_name, required=True, help="output path, without .bin and .idx")
    args = parser.parse_args(argv)
    prefixes = find_prefixes(args.input)
    merged = merge_datasets(prefixes, args.output_prefix)
    print(f"{args.output_prefix}: {len(prefixes)} datasets, {merged.document_count} documents, {merged.token_count} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, wrong=(DataError, OutputError), failed=OSError))
