"""Cut a text into training and validation documents, and make the tokenizer whose tokens are its characters.

    python examples/tiny_shakespeare_char/prepare.py input.txt runs/tiny_shakespeare_char

Writes train.jsonl (the first 90 % of the characters), valid.jsonl (the rest) and tokenizer.json; ids follow the sorted
characters.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout, also where it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    from megatron.files.outputs import InputPaths, OutputError, check_file
    from megatron.files.pending import write_whole
    from megatron.launch.tool_parser import ToolParser


def character_tokenizer(text: str) -> Tokenizer:
    """One token for each distinct character of `text`."""
    vocabulary = {character: number for number, character in enumerate(sorted(set(text)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="\x00"))  # not in it: an unseen character is an error
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def main() -> int:
    """Run the program, and return its exit status."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a plain text file in UTF-8")
    parser.add_argument("output", type=Path, help="directory to write to")
    arguments = parser.parse_args()
    try:
        text = arguments.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        print(f"error: cannot read {arguments.text}: {error}", file=sys.stderr)
        return 2
    cut = int(0.9 * len(text))
    if not text[:cut]:
        print(f"error: {arguments.text} is too short to be cut into two", file=sys.stderr)
        return 2
    try:
        for name in ("tokenizer.json", "train.jsonl", "valid.jsonl"):
            check_file("output", arguments.output / name, InputPaths([arguments.text]))
    except OutputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.output / "tokenizer.json", character_tokenizer(text).to_str(pretty=True))
    for name, part in (("train", text[:cut]), ("valid", text[cut:])):
        write_whole(arguments.output / f"{name}.jsonl", json.dumps({"text": part}) + "\n")
        print(f"{arguments.output / name}.jsonl: {len(part):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
