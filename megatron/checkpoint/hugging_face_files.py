"""Store the settings and tokenizer files of an imported Hugging Face directory, byte for byte, in checkpoints.

An import copies the files into the checkpoint, a run that starts from it copies them into its own checkpoints, and an export
writes them again: generation settings, lists of end tokens, chat templates, and the original tokenizer.
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
    """Return, by name, the tokenizer's own files and the kept Hugging Face files."""
    tokenizer_files = {} if tokenizer is None else tokenizer.files()
    return tokenizer_files | {f"{KEPT}/{name}": content for name, content in kept.items()}


def read_kept_files(directory: Path) -> dict[str, bytes]:
    """Read the kept Hugging Face files of a checkpoint directory, by name.

    CheckpointError when their bytes differ from the manifest, or for a file that no import keeps.
    """
    manifest, folder = read_manifest(directory), f"{TOKENIZER}/{KEPT}/"
    names = [name.removeprefix(folder) for name in manifest.files if name.startswith(folder)]
    # A checkpoint can come from a stranger, and an export must not write any other file: it could be code that someone runs.
    for name in names:
        is_chat_template = PurePosixPath(name).parent.as_posix() == CHAT_TEMPLATES and name.endswith(".jinja")
        if name not in (*SETTINGS, *TOKENIZER_FILES) and not is_chat_template:
            raise CheckpointError(f"{directory}/{folder}{name}: nothing of that name is kept of a Hugging Face directory")
    check_bytes(directory, manifest, [folder + name for name in names])
    return {name: read_bytes(checked_path(directory, folder + name), MAX_VOCABULARY_BYTES) for name in names}


def inherited_assets(tokenizer: Tokenizer, source: Path | None, say: Callable[[str], None]) -> dict[str, bytes]:
    """Return the tokenizer files of a run's checkpoints: the run's own, and the kept Hugging Face files of its source.

    Args:
        tokenizer: the run's tokenizer.
        source: the checkpoint directory that the run starts from, if any.
        say: called with one line if the kept files are left out because they belong to another tokenizer.

    Raises:
        CheckpointError, DataError: as `open_tokenizer`.
    """
    kept = {} if source is None else read_kept_files(source)
    if source is not None and kept:
        source_tokenizer = open_tokenizer(source)
        matches = same_ids(source_tokenizer, tokenizer) if source_tokenizer is not None else _same_end_token(tokenizer, kept)
        if not matches:
            say(f"the files of Hugging Face in {source} are of another tokenizer and are not kept on: {', '.join(kept)}")
            kept = {}
    return checkpoint_assets(tokenizer, kept)


def _same_end_token(tokenizer: Tokenizer, kept: Mapping[str, bytes]) -> bool:
    """Return whether the tokenizer's end token is one of the kept ones; True as well if either is unknown."""
    # The only evidence that the files belong to this tokenizer, if no tokenizer was imported with them.
    kept_ids, end_id = (kept_token_ids(kept) or {}).get("eos_token_id"), tokenizer.special.get("eod")
    unknown = kept_ids is None or end_id is None or isinstance(tokenizer, NullTokenizer)
    return unknown or end_id == kept_ids or (isinstance(kept_ids, list) and end_id in kept_ids)


def kept_token_ids(kept: Mapping[str, bytes]) -> dict[str, Any] | None:
    """Return the `*_token_id` entries of the kept config.json, including nulls and lists; None if it was not kept."""
    config = kept_config(kept)
    return None if config is None else {name: value for name, value in config.items() if name.endswith("_token_id")}


def kept_config(kept: Mapping[str, bytes]) -> dict[str, Any] | None:
    """Return the kept config.json as a dict; None if it was not kept."""
    return kept_json(kept, "config.json")


def kept_json(kept: Mapping[str, bytes], name: str) -> dict[str, Any] | None:
    """Return the JSON object in a kept file; None if the file was not kept. DataError if it is not a JSON object."""
    if name not in kept:
        return None
    try:
        value = parse_json(kept[name])
    except ValueError as error:
        raise DataError(f"the kept {name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"the kept {name} is not a JSON object")
    return value
