"""The tokenizer that a checkpoint holds."""

from __future__ import annotations

from pathlib import Path

from megatron.checkpoint.layout import MANIFEST, TOKENIZER, CheckpointError, check_bytes, read_manifest
from megatron.data.tokenizer import Tokenizer, load_tokenizer

# Subdirectory of the tokenizer's directory with the files of the imported Hugging Face model, see `hugging_face_files.py`.
KEPT = "hugging_face"


def open_tokenizer(directory: Path) -> Tokenizer | None:
    """Open the tokenizer saved in a checkpoint directory; None when there is none.

    CheckpointError when its files differ from the manifest; DataError when they are not a valid tokenizer.
    """
    folder, manifest = directory / TOKENIZER, read_manifest(directory)
    listed = {name for name in manifest.files if name.startswith(f"{TOKENIZER}/")}
    present = {path.relative_to(directory).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    # An unlisted file has no checksum, and a tokenizer library may read any file in its directory.
    if unlisted := sorted(present - listed):
        raise CheckpointError(f"{directory / unlisted[0]}: {MANIFEST} does not list it; take it away")
    check_bytes(directory, manifest, sorted(listed))
    has_tokenizer = any(not name.startswith(f"{TOKENIZER}/{KEPT}/") for name in listed)
    return load_tokenizer(folder) if has_tokenizer else None
