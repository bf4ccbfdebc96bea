"""Show the contents of a checkpoint: its iteration, configuration, scalars, tensors and files.

    python tools/inspect_checkpoint.py runs/gpt [--json]

Exit status: 0 done; 2 there is no readable checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.checkpoint.find import find_checkpoint
    from megatron.checkpoint.layout import CheckpointError, iteration_directories, read_config, read_manifest, read_state
    from megatron.launch.tool_parser import ToolParser, non_empty_path


def describe_checkpoint(directory: Path) -> dict[str, Any]:
    """Return everything except the tensors' values as the JSON object that --json prints; CheckpointError if it is damaged."""
    manifest = read_manifest(directory)
    return {
        "directory": str(directory),
        "iteration": manifest.iteration,
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "parameters": sum(prod(t.shape) for name, t in manifest.tensors.items() if name.startswith("model.")),
        "config": read_config(directory),
        "state": read_state(directory),
        "tensors": {
            name: {"dtype": t.dtype, "shape": list(t.shape), "pieces": len(t.pieces)} for name, t in manifest.tensors.items()
        },
        "files": {name: {"bytes": r.bytes, "sha256": r.sha256} for name, r in manifest.files.items()},
    }


def format_checkpoint(checkpoint: dict[str, Any], others: list[int]) -> list[str]:
    """Format a description as lines of text. `others` are the other iterations in the same directory."""
    counts = f"{checkpoint['parameters']:,} parameters, {checkpoint['bytes']:,} bytes"
    lines = [
        f"{checkpoint['directory']}: iteration {checkpoint['iteration']}, {counts}",
        f"other iterations: {', '.join(map(str, others)) or 'none'}",
        "",
    ]
    for section, values in checkpoint["config"].items():
        items = values.items() if isinstance(values, dict) else [("", values)]
        settings = ", ".join(f"{k} {v}" for k, v in items if v not in (None, [], ""))
        lines.append(f"config {section}: {settings}")
    lines += [f"state {part}: {json.dumps(values)}" for part, values in checkpoint["state"].items()]
    lines.append("")
    width = max(map(len, checkpoint["tensors"]), default=0)
    for name, t in checkpoint["tensors"].items():
        pieces = "" if t["pieces"] == 1 else f"  in {t['pieces']} pieces"
        lines.append(f"{name:{width}}  {t['dtype']:4}  {' x '.join(map(str, t['shape'])) or 'scalar'}{pieces}")
    lines.append("")
    lines += [f"{r['bytes']:>16,}  {name}" for name, r in checkpoint["files"].items()]
    return lines


def main() -> int:
    """Run the tool, and return its exit status."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "directory", type=non_empty_path, metavar="DIR", help="directory of checkpoints, or one iter_ directory"
    )
    parser.add_argument("--load-iteration", type=int, metavar="N", help="which iteration; default the latest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    try:
        directory = find_checkpoint(args.directory, args.load_iteration, lambda line: print(f"note: {line}", file=sys.stderr))
        checkpoint = describe_checkpoint(directory)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    others = [n for n in iteration_directories(directory.parent) if n != checkpoint["iteration"]]
    print(json.dumps(checkpoint, indent=1) if args.json else "\n".join(format_checkpoint(checkpoint, others)))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
