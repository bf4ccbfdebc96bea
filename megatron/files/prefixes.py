"""Suggest which dataset the user meant by a prefix that names none: one of a similar name, or a text to preprocess."""

from __future__ import annotations

import os
import re
from pathlib import Path

TEXTS = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")
PACKED = (".gz", ".zst", ".bz2", ".xz")
MAX_LISTED = 5  # datasets in a message


def suggest_prefix(prefix: str, level: str) -> str | None:
    """Return a suggestion for a prefix without .bin and .idx files, as the rest of a sentence about it.

    Args:
        prefix: the prefix, without .bin or .idx.
        level: the last word of the names of the datasets that the program reads, `document` or `sentence`.

    Returns:
        What exists instead, and what to do; None if there is no file with such a name.
    """
    stem = _stem(prefix)
    text = next((p for p in (prefix, *(stem + end + packed for end in TEXTS for packed in ("", *PACKED))) if _is_text(p)), None)
    try:
        near = _datasets(stem)
    except OSError:
        near = []
    inside = near if os.path.isdir(prefix) else [name for name in near if name.endswith(f"_{level}")] or near
    fitting = [name for name in inside if not name.endswith("_sentence" if level == "document" else "_document")]
    if fitting:
        if len(fitting) == 1:
            return f"give {fitting[0]}, which lies {'in' if os.path.isdir(prefix) else 'beside'} it"
        return f"give one of {', '.join(fitting[:MAX_LISTED])}{', ...' if len(fitting) > MAX_LISTED else ''}"
    split = " --split-sentences" if level == "sentence" else " --append-eod"
    making = (
        f"python tools/preprocess_data.py --input {text or 'TEXT.jsonl'} --output-prefix {stem} --tokenizer-type ...{split}"
    )
    if inside:
        kind = "whole documents, of GPT" if level == "sentence" else "sentences, of BERT"
        return f"beside it is only {inside[0]}, of {kind}; make the other: `{making}`"
    if text is not None:
        return f"{text} is a text, of which a dataset is to be made first: `{making}`, then give {stem}_text_{level}"
    return None


def _stem(prefix: str) -> str:
    """Return the prefix without the extension of a text file."""
    stem = prefix.rstrip("/") if os.path.isdir(prefix) else prefix
    for endings in (PACKED, TEXTS):
        stem = next((stem.removesuffix(end) for end in endings if stem.endswith(end)), stem)
    return stem


def _is_text(path: str) -> bool:
    """Return whether a path is a file with the extension of a text."""
    return os.path.isfile(path) and path.endswith((*TEXTS, *(end + packed for end in TEXTS for packed in PACKED)))


def _datasets(stem: str) -> list[str]:
    """Return the prefixes of datasets in the directory `stem`, or of those that preprocessing writes for the prefix `stem`."""
    folder, name = (Path(stem), "") if os.path.isdir(stem) else (Path(stem).parent, Path(stem).name)
    pattern = re.compile(r".*" if not name else re.escape(name) + r"_.+_(document|sentence)")
    found = sorted(entry.name[:-4] for entry in os.scandir(folder) if entry.name.endswith(".idx"))
    return [str(folder / each) for each in found if pattern.fullmatch(each) and (folder / f"{each}.bin").exists()]
