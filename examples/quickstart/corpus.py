"""Write the text that every CPython carries as JSON lines: the language reference and the standard library's sources.

    python examples/quickstart/corpus.py runs/quickstart/corpus.jsonl

One document a line, `{"text": ..., "source": ...}`: each topic of `pydoc_data.topics`, and each top-level module of the
standard library. The documents are shuffled with a fixed seed, so that a split by documents holds both kinds in each part.
"""

import argparse
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout, also where it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.files.outputs import InputPaths, OutputError, check_file
    from megatron.files.pending import write_whole
    from megatron.launch.tool_parser import ToolParser, non_empty_path


def documents() -> Iterator[tuple[str, str]]:
    """Pairs of (source, text). SystemExit when this Python came without its library's sources."""
    try:
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield f"pydoc_data.topics:{name}", topics[name]
    except ImportError:
        print("note: this Python has no pydoc_data; the corpus is the standard library alone", file=sys.stderr)
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not modules:
        sys.exit(f"error: no sources of the standard library in {sysconfig.get_path('stdlib')}")
    for path in modules:
        try:
            yield path.name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            print(f"note: {path} is not UTF-8 and is left out", file=sys.stderr)


def main() -> int:
    """Run the program, and return its exit status."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=non_empty_path, help="file to write")
    output: Path = parser.parse_args().output
    try:
        check_file("output", output, InputPaths([sysconfig.get_path("stdlib")]))
    except OutputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = [(source, text) for source, text in documents() if text.strip()]
    random.Random(0).shuffle(found)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, "".join(json.dumps({"text": text, "source": source}) + "\n" for source, text in found))
    print(f"{output}: {len(found)} documents, {sum(len(text) for _, text in found):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
