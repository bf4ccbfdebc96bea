"""A Hugging Face directory as our configuration and weights: the tables of families/ read backwards.

Read are `config.json` and safetensors files, one or several with an index. What the model here does not have is refused by its
name, and so are tensors that no trained model has. A matrix that transformers ties to another and that a file holds as well is
compared with it.
"""

from __future__ import annotations

import os
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron.checkpoint.layout import CheckpointError
from megatron.config.schema import ModelConfig
from megatron.files.foreign import POINTER, is_lfs_pointer, reason_unfit, recognize_file
from megatron.files.regular import MAX_INDEX_BYTES, MAX_SETTINGS_BYTES, check_regular, error_reason, open_regular, read_json
from megatron.interop.families.family import HFFamily
from megatron.interop.families.table import family_named
from megatron.interop.foreign_numbers import check_config
from megatron.interop.hf_config import model_settings, saved_dtype
from megatron.interop.soundness import refuse_unsound, zero_matrices

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"


def read_hf(directory: Path, say: Callable[[str], None] = print) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The resolved configuration and the weights, under our names, of a directory that transformers wrote.

    Args:
        directory: with `config.json` and safetensors files.
        say: is told, a line each, what was decided where the files contradict one another, and which matrices are all zeros.

    Raises:
        CheckpointError: naming the field, the tensor or the file that stands in the way.
    """
    _check_directory(directory)
    if os.path.lexists(directory / ADAPTER):
        raise CheckpointError(
            f"{directory}: there is an {ADAPTER} in it, of weights that change a model's (PEFT), which is not read; merge "
            "both with merge_and_unload() and save_pretrained, or take the adapter away"
        )
    about = _json(directory / "config.json")
    check_config(about, str(directory / "config.json"))
    try:
        family = family_named(str(about.get("model_type")))
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    try:
        config = model_settings(about, family)
        found = _tensors(directory, family)
        refuse_unsound(found)
        config = _without_copies(config, found, family.copies, say)
        _tell_of_dtype(about, found, say)
        return _read(about, family, config, found, say)
    except CheckpointError as error:
        raise error if str(directory) in str(error) else CheckpointError(f"{directory}: {error}") from error


def _without_copies(
    config: ModelConfig, found: dict[str, Tensor], copies: Mapping[str, str], say: Callable[[str], None]
) -> ModelConfig:
    """Take tied copies out of `found`; returns the configuration, untied where the copy of the embedding differs from it.

    So does transformers 5: where the file has both and they differ, it uses both.
    """
    for copy, original in copies.items() if not config.untie_embeddings_and_output_weights else ():
        if copy not in found:
            continue
        if original not in found:
            found[original] = found.pop(copy)
        elif _equal(found[copy], found[original]):
            del found[copy]
        elif config.architecture == "bert":
            raise CheckpointError(f"{copy} differs from {original}; the model here has one tensor for both")
        else:
            say(f"config.json ties the output layer to the embedding, but {copy} differs from {original}: it is read as untied")
            return replace(config, untie_embeddings_and_output_weights=True)
    return config


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype:
        one, other = one.double(), other.double()
    return one.shape == other.shape and torch.equal(one, other)


def _tell_of_dtype(about: Mapping[str, Any], found: Mapping[str, Tensor], say: Callable[[str], None]) -> None:
    """A note where transformers 5 would round the tensors as it opens them, to the type that config.json names."""
    if (name := saved_dtype(about)) is None:
        return
    to = getattr(torch, name)
    if lost := sorted({str(t.dtype) for t in found.values() if torch.promote_types(t.dtype, to) != to}):
        say(f"config.json says {name}, and tensors are {', '.join(lost).replace('torch.', '')}: they are kept as they are")


def _read(
    about: Mapping[str, Any], family: HFFamily, config: ModelConfig, found: dict[str, Tensor], say: Callable[[str], None]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    config, saved_from = family.class_of(config, found, about)
    weights: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in saved_from.table(config):
        if row.ours == "head.weight" and config.ties_embeddings:
            continue
        if row.ours.endswith(".bias") and not config.add_bias_linear and row.zeros is None:
            continue
        if lacking := [name for name in row.theirs if name not in found]:
            raise CheckpointError(
                f"there is no tensor {lacking[0]}, which {saved_from.architecture} has; save it from that class"
            )
        tensors = {name: found[name] for name in row.theirs}
        for name in zero_matrices(tensors) if row.zeros is None else ():
            say(f"{name} is all zeros; was the model saved whole?")
        try:
            weights[row.ours] = row.form.read(tuple(tensors.values()), config).contiguous()
        except RuntimeError as error:
            raise CheckpointError(f"{row.theirs[0]}: its shape does not fit config.json") from error
        used |= set(row.theirs)
    if left := sorted(found.keys() - used):
        raise CheckpointError(
            f"{saved_from.architecture} has no tensor {', '.join(left[:10])}; it is another model than config.json says"
        )
    return config, weights


def _check_directory(directory: Path) -> None:
    """CheckpointError where there is no such directory, or where it is that of the hub's cache above the model's."""
    if (why := reason_unfit(directory, "Hugging Face")) is not None:
        raise CheckpointError(f"{directory}: {why}")


def _json(path: Path, max_bytes: int = MAX_SETTINGS_BYTES) -> dict[str, Any]:
    try:
        values = read_json(path, max_bytes)
    except FileNotFoundError as error:
        why = f"{path} is {error.strerror}" if path.is_symlink() else f"there is no {path.name} in it"
        raise CheckpointError(f"{path.parent}: {why}") from error
    except (OSError, ValueError) as error:
        if (found := recognize_file(path)) is not None:
            raise CheckpointError(f"{path}: it is {found}") from error
        raise CheckpointError(f"{path}: not readable: {error_reason(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    with open_regular(path) as file:
        if file.read(len(BOM_UTF8)) == BOM_UTF8:
            raise CheckpointError(f"{path}: it begins with a byte-order mark, which transformers refuses; save it without")
    return values


def _tensors(directory: Path, family: HFFamily) -> dict[str, Tensor]:
    """All tensors in the directory's safetensors files, without the constants, with the prefix that a bare model lacks."""
    found: dict[str, Tensor] = {}
    for name in _tensor_files(directory):
        tensors = _read_tensors(directory / name)
        if twice := sorted(key for key in tensors.keys() & found.keys() if not _equal(tensors[key], found[key])):
            raise CheckpointError(f"{directory / name}: {twice[0]} is another one in a file before it; which is right?")
        found |= tensors
    found = {key: tensor for key, tensor in found.items() if not key.endswith(family.constants)}
    if not any(key.startswith(family.prefix) for key in found):
        found = {key if key.startswith(family.heads) else family.prefix + key: tensor for key, tensor in found.items()}
    return found


def _tensor_files(directory: Path) -> list[str]:
    """The names of the directory's safetensors files: the single one, or those that the index names."""
    if os.path.lexists(directory / "model.safetensors"):
        return ["model.safetensors"]
    if os.path.lexists(directory / INDEX):
        where = _json(directory / INDEX, MAX_INDEX_BYTES).get("weight_map")
        files = where.values() if isinstance(where, dict) else ()
        names = sorted({name for name in files if isinstance(name, str) and Path(name).name == name})
        if not names or any(name not in names for name in files):
            raise CheckpointError(f"{directory / INDEX}: its weight_map does not name files of this directory")
        return names
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    held = f"{pickled[0]} is a pickle, which can run code, and is not read" if pickled else "there is no model.safetensors"
    raise CheckpointError(f"{directory}: {held}; open the model with transformers and save_pretrained it, to have safetensors")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by their names there. CheckpointError when it cannot be read."""
    try:
        check_regular(path)
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
    except Exception as error:  # the package raises its own kind and others
        if is_lfs_pointer(path):
            raise CheckpointError(f"{path}: it is {POINTER}") from error
        raise CheckpointError(f"{path}: not a readable safetensors file: {error_reason(error)}") from error
