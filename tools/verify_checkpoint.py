"""Compare every byte of a checkpoint with its manifest.

    python tools/verify_checkpoint.py runs/gpt                  the latest
    python tools/verify_checkpoint.py runs/gpt/iter_0000100     this one

Exit status: 0 whole; 1 damaged, with the file named; 2 there is no checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # this checkout, also where it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.checkpoint.find import find_checkpoint
    from megatron.checkpoint.layout import CheckpointError, CheckpointNotFound, verify
    from megatron.launch.tool_parser import ToolParser, non_empty_path


def main() -> int:
    """Run the tool, and return its exit status."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "directory", type=non_empty_path, metavar="DIR", help="directory of checkpoints, or one iter_ directory"
    )
    parser.add_argument("--load-iteration", type=int, metavar="N", help="which iteration; default the latest")
    given = parser.parse_args()
    try:
        report = lambda line: print(f"note: {line}", file=sys.stderr)  # noqa: E731
        directory = find_checkpoint(given.directory, given.load_iteration, report, skip_damaged=False)
        manifest = verify(directory)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, CheckpointNotFound) else 1
    size = sum(record.bytes for record in manifest.files.values())
    print(
        f"{directory}: {len(manifest.files)} files, {len(manifest.tensors)} tensors, {size:,} bytes, all as the manifest says"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
