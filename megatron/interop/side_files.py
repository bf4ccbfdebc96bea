"""Read and write the files beside the weights of a Hugging Face directory, which checkpoints store byte for byte.

They are generation settings, lists of end tokens, chat templates and the tokenizer's files. An import copies them into the
checkpoint, training copies them from checkpoint to checkpoint, and an export writes them again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint.hugging_face_files import CHAT_TEMPLATES, GENERATION, SETTINGS, TOKENIZER_FILES, kept_config, kept_json
from megatron.data.hugging_face import VOCABULARIES
from megatron.data.tokenizer_base import Tokenizer, read_tokenizer_file

# Generation settings that were in config.json before generation_config.json existed; transformers still reads them there.
LEGACY_GENERATION_FIELDS = frozenset(
    {
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
        *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "remove_invalid_values", "suppress_tokens"),
        *("begin_suppress_tokens", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"),
    }
)


def read_side_files(directory: Path, *, tokenizer: bool) -> dict[str, bytes]:
    """Return name -> content of a Hugging Face directory's side files. tokenizer: include the files of its tokenizer."""
    names = [*SETTINGS, *(TOKENIZER_FILES if tokenizer else ())]
    paths = [directory / name for name in names]
    if tokenizer:
        paths += sorted((directory / CHAT_TEMPLATES).glob("*.jinja"))
    return {p.relative_to(directory).as_posix(): read_tokenizer_file(str(p), "--input") for p in paths if os.path.lexists(p)}


def with_chosen_eod(kept: Mapping[str, bytes], tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """Return the kept files with the token of --eod-token added as the first `eos_token_id`, if it was none before."""
    files, eod = dict(kept), tokenizer.chosen.get("eod") if tokenizer is not None else None
    for name in SETTINGS:
        settings = kept_json(files, name)
        if eod is None or settings is None:
            continue
        eos = settings.get("eos_token_id")
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if eod not in eos_ids:
            settings["eos_token_id"] = [eod, *eos_ids] if eos_ids else eod
            files[name] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def legacy_generation_settings(kept: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the generation settings in the kept config.json; empty if generation_config.json is kept too."""
    hf_config = None if GENERATION in kept else kept_config(kept)
    return {name: value for name, value in (hf_config or {}).items() if name in LEGACY_GENERATION_FIELDS and value is not None}


def has_tokenizer(kept: Mapping[str, bytes]) -> bool:
    """Return whether the kept files contain a tokenizer's vocabulary."""
    return any(name in kept for name in VOCABULARIES)


def write_side_files(kept: Mapping[str, bytes], out: Path) -> None:
    """Write the kept files into a Hugging Face directory, except config.json, which is written with the weights."""
    for name, content in kept.items():
        if name != "config.json":
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(content)
