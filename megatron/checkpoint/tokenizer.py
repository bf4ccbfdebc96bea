"""The tokenizer that a checkpoint holds."""

from __future__ import annotations

from pathlib import Path

from megatron.checkpoint.layout import MANIFEST, TOKENIZER, CheckpointError, check_bytes, read_manifest
from megatron.data.tokenizer import Tokenizer, load_tokenizer

# Within the tokenizer's directory: the files of the Hugging Face directory that it came from, see `hugging_face_files.py`.
KEPT = "hugging_face"


def open_tokenizer(directory: Path) -> Tokenizer | None:
    """Open the tokenizer saved in a checkpoint directory; None when there is none.

    CheckpointError when its files are not those that the manifest lists; DataError when they are no tokenizer.
    """
    folder, manifest = directory / TOKENIZER, read_manifest(directory)
    listed = {name for name in manifest.files if name.startswith(f"{TOKENIZER}/")}
    there = {path.relative_to(directory).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    # A file that no manifest lists has no checksum, and a tokenizer library may read whatever lies in its directory.
    if strange := sorted(there - listed):
        raise CheckpointError(f"{directory / strange[0]}: {MANIFEST} does not list it; take it away")
    check_bytes(directory, manifest, sorted(listed))
    own = any(not name.startswith(f"{TOKENIZER}/{KEPT}/") for name in listed)
    return load_tokenizer(folder) if own else None
