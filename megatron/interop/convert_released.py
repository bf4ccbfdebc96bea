"""The command line of the two scripts in tools/ that convert NVIDIA's released archives; they differ in the kind of model."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.layout import CheckpointError
from megatron.checkpoint.storage import Storage
from megatron.data.errors import DataError
from megatron.data.fast_tokenizers import GPT2BPETokenizer
from megatron.files.outputs import InputPaths, OutputError, check_file
from megatron.files.regular import read_json
from megatron.interop.checked_import import check_weights
from megatron.interop.megatron_files import args_in_file
from megatron.interop.released_archives import model_from_archive, read_archive, read_config_file, write_hf_directory
from megatron.interop.released_kinds import GPT2_KIND, ReleasedKind
from megatron.launch.tool_parser import ToolParser, non_empty_path

OUTPUT_NAMES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# The names under which GPT-2's vocabulary and merges are published; they are searched beside the archive.
VOCABULARY_FILES = (("gpt2-vocab.json", "gpt2-merges.txt"), ("vocab.json", "merges.txt"))


def parse_arguments(kind: ReleasedKind, doc: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line of the script for one kind of model.

    Args:
        kind: the kind of model that the script converts.
        doc: the script's docstring, for --help.
        argv: the arguments; None for `sys.argv[1:]`.
    """
    parser = ToolParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print-checkpoint-structure", action="store_true", help="list what is in the archive")
    parser.add_argument(
        "path_to_checkpoint",
        type=non_empty_path,
        metavar="PATH",
        help=f"the archive (.zip) of a Megatron {kind.name}, or the .pt file",
    )
    parser.add_argument(
        "--config_file", default="", metavar="F", help="a config.json with the model's sizes, where the archive has none"
    )
    return parser.parse_args(argv)


def main(kind: ReleasedKind, doc: str | None, argv: Sequence[str] | None = None) -> int:
    """Run the script for one kind of model.

    Args:
        kind: the kind of model that the script converts.
        doc: the script's docstring, for --help.
        argv: the arguments; None for `sys.argv[1:]`.

    Returns:
        The exit status: 0 for success, 2 for bad input, 1 for an error of the file system.
    """
    args = parse_arguments(kind, doc, argv)
    path: Path = args.path_to_checkpoint
    out = path.parent
    try:
        inputs = InputPaths([path, *([args.config_file] if args.config_file else [])])
        for name in OUTPUT_NAMES if os.path.exists(path) else ():
            check_file("the output", out / name, inputs)
        print(f"reading {path}")
        file = read_archive(path)
        if args.print_checkpoint_structure:
            print("\n".join(describe_structure(file)))
        config_file = read_config_file(Path(args.config_file)) if args.config_file else None
        model = model_from_archive(file, kind, config_file)
        check_weights(model.config, model.weights)
        write_hf_directory(model, kind, out)
        print(f"wrote {out / 'config.json'} and the weights beside it")
        if kind is GPT2_KIND:
            print(write_gpt2_tokenizer(out, args_in_file(file).get("tokenizer_type"), model.hf_config))
    except (OutputError, CheckpointError, DataError) as error:
        text = str(error)
        print(f"error: {text if str(path) in text else f'{path}: {text}'}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def describe_structure(value: Any, indent: int = 0) -> list[str]:
    """Return lines that list a nested dictionary: keys, shapes and dtypes of tensors, and other values."""
    lines = []
    for key, item in value.items():
        start = " " * indent + str(key)
        if isinstance(item, Mapping):
            lines += [f"{start}:", *describe_structure(item, indent + 2)]
        elif isinstance(item, Tensor):
            lines.append(f"{start}: {'x'.join(map(str, item.shape)) or 'scalar'} {str(item.dtype).removeprefix('torch.')}")
        elif isinstance(item, bool | int | float | str | None):
            lines.append(f"{start}: {item!r}")
        else:
            lines.append(f"{start}: {type(item).__name__}")
    return lines


def write_gpt2_tokenizer(out: Path, tokenizer_type: Any, hf_config: Mapping[str, Any]) -> str:
    """Write GPT-2's tokenizer if its files are beside the archive or in the cache of transformers.

    Args:
        out: the output directory, which is also the archive's.
        tokenizer_type: --tokenizer-type in the archive's args; None if they do not contain it.
        hf_config: the content of config.json.

    Returns:
        A line about where the tokenizer was found, or how to get it.
    """
    if tokenizer_type not in (None, "GPT2BPETokenizer"):
        return f"no tokenizer files: the model was trained with {tokenizer_type}; add its files yourself"
    length = int(hf_config["n_positions"])
    for vocab, merges in VOCABULARY_FILES:
        if (out / vocab).is_file() and (out / merges).is_file():
            GPT2BPETokenizer(str(out / vocab), str(out / merges)).hf_files(out, length)
            return f"wrote the tokenizer from {out / vocab} and {out / merges}"
    if cached := _cached_gpt2_tokenizer():
        cached.save_pretrained(str(out))
        _name_tokenizer_class(out / "tokenizer_config.json")
        return "wrote the tokenizer from the cache of transformers"
    return (
        f"no tokenizer files: put gpt2-vocab.json and gpt2-merges.txt into {out} and start again, or open the model with "
        'AutoTokenizer.from_pretrained("gpt2")'
    )


def _cached_gpt2_tokenizer() -> Any:
    """Return GPT-2's tokenizer from the cache of transformers, without any download; None if it cannot be opened."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers

        return transformers.AutoTokenizer.from_pretrained("gpt2", local_files_only=True)
    except Exception:  # not installed, not cached, or damaged
        return None


def _name_tokenizer_class(path: Path) -> None:
    """Write the tokenizer class of config.json into tokenizer_config.json, since versions of transformers write other ones."""
    settings = read_json(path)
    Storage().write(path, [(json.dumps({**settings, "tokenizer_class": "GPT2TokenizerFast"}, indent=2) + "\n").encode()])
