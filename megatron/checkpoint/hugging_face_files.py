"""Keep what a Hugging Face directory said beside its weights, byte for byte in the checkpoints that come of it.

An import puts the files into the checkpoint, training on from it carries them from checkpoint to checkpoint, and an export
writes them again: generation settings, lists of end tokens, chat templates, and the tokenizer as its authors wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from megatron.checkpoint.layout import TOKENIZER, CheckpointError, check_bytes, checked_path, read_manifest
from megatron.checkpoint.tokenizer import KEPT, open_tokenizer
from megatron.data.errors import DataError
from megatron.data.hugging_face import VOCABULARIES
from megatron.data.matching import same_ids
from megatron.data.tokenizer import NullTokenizer
from megatron.data.tokenizer_base import Tokenizer
from megatron.files.regular import MAX_VOCABULARY_BYTES, parse_json, read_bytes

GENERATION = "generation_config.json"
SETTINGS = ("config.json", GENERATION)
TOKENIZER_FILES = (
    *VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
CHAT_TEMPLATES = "additional_chat_templates"


def checkpoint_assets(tokenizer: Tokenizer | None, kept: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files of a checkpoint's tokenizer, and the kept ones beside them, by name."""
    own = {} if tokenizer is None else tokenizer.files()
    return own | {f"{KEPT}/{name}": content for name, content in kept.items()}


def read_kept_files(directory: Path) -> dict[str, bytes]:
    """Read the files that were kept in a checkpoint directory, by name.

    CheckpointError when their bytes are not the manifest's, or for a name that is never kept.
    """
    manifest, folder = read_manifest(directory), f"{TOKENIZER}/{KEPT}/"
    names = [name.removeprefix(folder) for name in manifest.files if name.startswith(folder)]
    # Whoever made the checkpoint, an export writes no other file for it: one could be code, which a reader would run.
    for name in names:
        templates = PurePosixPath(name).parent.as_posix() == CHAT_TEMPLATES and name.endswith(".jinja")
        if name not in (*SETTINGS, *TOKENIZER_FILES) and not templates:
            raise CheckpointError(f"{directory}/{folder}{name}: nothing of that name is kept of a Hugging Face directory")
    check_bytes(directory, manifest, [folder + name for name in names])
    return {name: read_bytes(checked_path(directory, folder + name), MAX_VOCABULARY_BYTES) for name in names}


def inherited_assets(tokenizer: Tokenizer, source: Path | None, say: Callable[[str], None]) -> dict[str, bytes]:
    """Return what a run's checkpoints hold beside the weights: its tokenizer, and what was kept in the one it starts from.

    Args:
        tokenizer: the run's.
        source: the checkpoint directory that the run starts from, if any.
        say: is told in a line when the kept files are left out, since they are of another tokenizer.

    Raises:
        CheckpointError, DataError: as `open_tokenizer`.
    """
    kept = {} if source is None else read_kept_files(source)
    if source is not None and kept:
        held = open_tokenizer(source)
        if not same_ids(held, tokenizer) if held is not None else not _ends_alike(tokenizer, kept):
            say(f"the files of Hugging Face in {source} are of another tokenizer and are not kept on: {', '.join(kept)}")
            kept = {}
    return checkpoint_assets(tokenizer, kept)


def _ends_alike(tokenizer: Tokenizer, kept: Mapping[str, bytes]) -> bool:
    """Return whether a tokenizer has one of the kept end tokens; also where either does not say."""
    # The only sign that the files are of this tokenizer, where none was imported with them.
    ends, end = (kept_token_ids(kept) or {}).get("eos_token_id"), tokenizer.special.get("eod")
    unknown = ends is None or end is None or isinstance(tokenizer, NullTokenizer)
    return unknown or end == ends or (isinstance(ends, list) and end in ends)


def kept_token_ids(kept: Mapping[str, bytes]) -> dict[str, Any] | None:
    """Return the ids of special tokens that the kept config.json names, null and lists among them; None where none is kept."""
    about = kept_config(kept)
    return None if about is None else {name: value for name, value in about.items() if name.endswith("_token_id")}


def kept_config(kept: Mapping[str, bytes]) -> dict[str, Any] | None:
    """Return the kept config.json as an object; None where none is kept."""
    return kept_json(kept, "config.json")


def kept_json(kept: Mapping[str, bytes], name: str) -> dict[str, Any] | None:
    """Return the JSON object in a kept file; None where it is not kept. DataError where it is none."""
    if name not in kept:
        return None
    try:
        about = parse_json(kept[name])
    except ValueError as error:
        raise DataError(f"the kept {name} is no JSON: {error}") from error
    if not isinstance(about, dict):
        raise DataError(f"the kept {name} is no JSON object")
    return about
