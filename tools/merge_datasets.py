#!/usr/bin/env python
"""Join indexed datasets, in the order given, into one."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # this checkout, also where it is not installed

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
        help="prefixes, or a directory for all in it",
    )
    parser.add_argument("--output-prefix", type=non_empty_name, required=True, help="path of the output, without its ending")
    args = parser.parse_args(argv)
    prefixes = find_prefixes(args.input)
    joined = merge_datasets(prefixes, args.output_prefix)
    print(f"{args.output_prefix}: {len(prefixes)} datasets, {joined.document_count} documents, {joined.token_count} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, wrong=(DataError, OutputError), failed=OSError))
