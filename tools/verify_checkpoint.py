"""Verify the size and checksum of every file of a checkpoint against its manifest.

    python tools/verify_checkpoint.py runs/gpt                  the latest checkpoint
    python tools/verify_checkpoint.py runs/gpt/iter_0000100     this checkpoint

Exit status: 0 undamaged; 1 damaged, with the name of the file; 2 there is no checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

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
    args = parser.parse_args()
    try:
        report = lambda line: print(f"note: {line}", file=sys.stderr)  # noqa: E731
        directory = find_checkpoint(args.directory, args.load_iteration, report, skip_damaged=False)
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
