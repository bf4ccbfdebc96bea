"""The commands that convert NVIDIA's released archives; their two scripts in tools/ differ only in the kind of model."""

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
from megatron.interop.checked_import import compare
from megatron.interop.megatron_files import arguments_of
from megatron.interop.released import read_archive, read_config_file, understand, write
from megatron.interop.released_kinds import GPT2_KIND, Kind
from megatron.launch.tool_parser import ToolParser, non_empty_path

OUTPUTS = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# Where GPT-2's two files are looked for beside the archive: the names under which they are published.
VOCABULARIES = (("gpt2-vocab.json", "gpt2-merges.txt"), ("vocab.json", "merges.txt"))


def arguments(kind: Kind, doc: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line of the script for one kind of model. doc: its docstring."""
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


def main(kind: Kind, doc: str | None, argv: Sequence[str] | None = None) -> int:
    """One command, to its exit status: 0 done, 2 bad input, 1 a disk that refuses."""
    given = arguments(kind, doc, argv)
    path: Path = given.path_to_checkpoint
    out = path.parent
    try:
        read = InputPaths([path, *([given.config_file] if given.config_file else [])])
        for name in OUTPUTS if os.path.exists(path) else ():
            check_file("the output", out / name, read)
        print(f"reading {path}")
        file = read_archive(path)
        if given.print_checkpoint_structure:
            print("\n".join(structure(file)))
        config_file = read_config_file(Path(given.config_file)) if given.config_file else None
        found = understand(file, kind, config_file)
        compare(found.model, found.weights)
        write(found, kind, out)
        print(f"wrote {out / 'config.json'} and the weights beside it")
        if kind is GPT2_KIND:
            print(gpt2_tokenizer(out, arguments_of(file).get("tokenizer_type"), found.about))
    except (OutputError, CheckpointError, DataError) as error:
        text = str(error)
        print(f"error: {text if str(path) in text else f'{path}: {text}'}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def structure(value: Any, indent: int = 0) -> list[str]:
    """A nested dictionary as lines: names, and the shapes of tensors."""
    lines = []
    for key, held in value.items():
        start = " " * indent + str(key)
        if isinstance(held, Mapping):
            lines += [f"{start}:", *structure(held, indent + 2)]
        elif isinstance(held, Tensor):
            lines.append(f"{start}: {'x'.join(map(str, held.shape)) or 'scalar'} {str(held.dtype).removeprefix('torch.')}")
        elif isinstance(held, bool | int | float | str | None):
            lines.append(f"{start}: {held!r}")
        else:
            lines.append(f"{start}: {type(held).__name__}")
    return lines


def gpt2_tokenizer(out: Path, named: Any, about: Mapping[str, Any]) -> str:
    """Write GPT-2's tokenizer into `out` where its files can be had on this machine; what happened, as a line."""
    if named not in (None, "GPT2BPETokenizer"):
        return f"no tokenizer files: the model was trained with {named}; bring that one yourself"
    length = int(about["n_positions"])
    for vocab, merges in VOCABULARIES:
        if (out / vocab).is_file() and (out / merges).is_file():
            GPT2BPETokenizer(str(out / vocab), str(out / merges)).hf_files(out, length)
            return f"wrote the tokenizer from {out / vocab} and {out / merges}"
    if cached := _cached():
        cached.save_pretrained(str(out))
        _own_class(out / "tokenizer_config.json")
        return "wrote the tokenizer from the cache of transformers"
    return (
        f"no tokenizer files: put gpt2-vocab.json and gpt2-merges.txt into {out} and start again, or open the model with "
        'AutoTokenizer.from_pretrained("gpt2")'
    )


def _cached() -> Any:
    """GPT-2's tokenizer from the cache of transformers; None where either is not there. Nothing is downloaded."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers

        return transformers.AutoTokenizer.from_pretrained("gpt2", local_files_only=True)
    except Exception:  # whatever it trips over: then there is none
        return None


def _own_class(path: Path) -> None:
    """The class that config.json names, whatever the installed version of transformers calls it."""
    about = read_json(path)
    Storage().write(path, [(json.dumps({**about, "tokenizer_class": "GPT2TokenizerFast"}, indent=2) + "\n").encode()])
