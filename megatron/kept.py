"""What a Hugging Face directory says beside its weights, kept byte for byte in the checkpoints that come of it.

An import puts the files into the checkpoint, training on from it carries them from checkpoint to checkpoint, and an export
writes them again: generation settings, lists of end tokens, chat templates, and the tokenizer as its authors wrote it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from megatron.checkpoint.layout import TOKENIZER, CheckpointError, check_bytes, path_in, read_manifest
from megatron.data.errors import DataError
from megatron.data.hugging_face import VOCABULARIES
from megatron.data.tokenizer import NullTokenizer
from megatron.data.tokenizer_base import Tokenizer, read
from megatron.files.regular import MAX_VOCABULARY_BYTES, parse_json, read_bytes
from megatron.hf_tokenizers import same_ids
from megatron.restore import KEPT, open_tokenizer

GENERATION = "generation_config.json"
SETTINGS = ("config.json", GENERATION)
TOKENIZER_FILES = (
    *VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
# Settings of generation that stood in config.json before they had a file of their own; transformers still reads them there.
OLD_SETTINGS = frozenset(
    {
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
        *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "remove_invalid_values", "suppress_tokens"),
        *("begin_suppress_tokens", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"),
    }
)


def of_source(directory: Path, *, tokenizer: bool) -> dict[str, bytes]:
    """The files of a Hugging Face directory that are kept, by name. tokenizer: also those of its tokenizer."""
    names = [*SETTINGS, *(TOKENIZER_FILES if tokenizer else ())]
    paths = [directory / name for name in names]
    if tokenizer:
        paths += sorted((directory / TEMPLATES).glob("*.jinja"))
    return {p.relative_to(directory).as_posix(): read(str(p), "--input") for p in paths if os.path.lexists(p)}


def assets(tokenizer: Tokenizer | None, kept: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a checkpoint's tokenizer, and the kept ones beside them."""
    own = {} if tokenizer is None else tokenizer.files()
    return own | {f"{KEPT}/{name}": content for name, content in kept.items()}


def in_checkpoint(directory: Path) -> dict[str, bytes]:
    """The files that were kept in a checkpoint directory, by name. CheckpointError when their bytes are not the manifest's."""
    manifest, folder = read_manifest(directory), f"{TOKENIZER}/{KEPT}/"
    names = [name.removeprefix(folder) for name in manifest.files if name.startswith(folder)]
    for name in names:  # whoever made the checkpoint, an export writes no other file for it
        templates = PurePosixPath(name).parent.as_posix() == TEMPLATES and name.endswith(".jinja")
        if name not in (*SETTINGS, *TOKENIZER_FILES) and not templates:
            raise CheckpointError(f"{directory}/{folder}{name}: nothing of that name is kept of a Hugging Face directory")
    check_bytes(directory, manifest, [folder + name for name in names])
    return {name: read_bytes(path_in(directory, folder + name), MAX_VOCABULARY_BYTES) for name in names}


def carried(tokenizer: Tokenizer, source: Path | None, say: Callable[[str], None]) -> dict[str, bytes]:
    """Return what a run's checkpoints hold beside the weights: its tokenizer, and what was kept in the one it starts from.

    Args:
        tokenizer: the run's.
        source: the checkpoint directory that the run starts from, if any.
        say: is told in a line when the kept files are left out, since they are of another tokenizer.

    Raises:
        CheckpointError, DataError: as `open_tokenizer`.
    """
    kept = {} if source is None else in_checkpoint(source)
    if source is not None and kept:
        held = open_tokenizer(source)
        if not same_ids(held, tokenizer) if held is not None else not _ends_alike(tokenizer, kept):
            say(f"the files of Hugging Face in {source} are of another tokenizer and are not kept on: {', '.join(kept)}")
            kept = {}
    return assets(tokenizer, kept)


def _ends_alike(tokenizer: Tokenizer, kept: Mapping[str, bytes]) -> bool:
    """Whether a tokenizer has one of the kept end tokens: the only sign that it is theirs, where none was imported."""
    ends, end = (token_ids(kept) or {}).get("eos_token_id"), tokenizer.special.get("eod")
    unknown = ends is None or end is None or isinstance(tokenizer, NullTokenizer)
    return unknown or end == ends or (isinstance(ends, list) and end in ends)


def token_ids(kept: Mapping[str, bytes]) -> dict[str, Any] | None:
    """The ids of special tokens that the kept config.json names, null and lists among them; None where none is kept."""
    about = _config(kept)
    return None if about is None else {name: value for name, value in about.items() if name.endswith("_token_id")}


def with_chosen_end(kept: Mapping[str, bytes], tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """Return the kept files in which the token that --eod-token chose ends a text too, before those that did already."""
    files, end = dict(kept), tokenizer.chosen.get("eod") if tokenizer is not None else None
    for name in SETTINGS:
        about = _object(files, name)
        if end is None or about is None:
            continue
        ends = about.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if end not in ends:
            about["eos_token_id"] = [end, *ends] if ends else end
            files[name] = (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def old_settings(kept: Mapping[str, bytes]) -> dict[str, Any]:
    """The settings of generation that the kept config.json holds, where no file of their own is kept."""
    about = None if GENERATION in kept else _config(kept)
    return {name: value for name, value in (about or {}).items() if name in OLD_SETTINGS and value is not None}


def _config(kept: Mapping[str, bytes]) -> dict[str, Any] | None:
    return _object(kept, "config.json")


def _object(kept: Mapping[str, bytes], name: str) -> dict[str, Any] | None:
    """The JSON object in a kept file; None where it is not kept."""
    if name not in kept:
        return None
    try:
        about = parse_json(kept[name])
    except ValueError as error:
        raise DataError(f"the kept {name} is no JSON: {error}") from error
    if not isinstance(about, dict):
        raise DataError(f"the kept {name} is no JSON object")
    return about


def has_tokenizer(kept: Mapping[str, bytes]) -> bool:
    """Whether a vocabulary is among the kept files."""
    return any(name in kept for name in VOCABULARIES)


def write(kept: Mapping[str, bytes], out: Path) -> None:
    """Write the kept files into a Hugging Face directory, all but config.json, which the weights decide."""
    for name, content in kept.items():
        if name != "config.json":
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(content)
