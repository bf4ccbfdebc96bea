"""Read a Hugging Face directory as our configuration and weights: the tables of families/ from right to left.

The files are `config.json` and safetensors, one or several with an index. Fields that the model here does not have are refused
by name, and so are tensors that no trained model has. A matrix that transformers ties to another and that a file holds as well
is compared with it.
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
from megatron.files.foreign import LFS_POINTER, is_lfs_pointer, recognize_file, why_not_weights
from megatron.files.regular import MAX_INDEX_BYTES, MAX_SETTINGS_BYTES, check_regular, error_reason, open_regular, read_json
from megatron.interop.families.family import HFFamily
from megatron.interop.families.table import family_named
from megatron.interop.foreign_values import check_hf_config
from megatron.interop.hf_config import config_from_hf, saved_dtype
from megatron.interop.weight_checks import refuse_unsound, zero_matrices

INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"


def read_hf(directory: Path, say: Callable[[str], None] = print) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read the resolved configuration and the weights of a directory that transformers wrote.

    Args:
        directory: with `config.json` and safetensors files.
        say: is told, a line each, what was decided where the files contradict one another, and which matrices are all zeros.

    Returns:
        The configuration, and the weights under our names, whole, of the types that they have in the files.

    Raises:
        CheckpointError: naming the field, the tensor or the file that stands in the way.
    """
    _check_directory(directory)
    if os.path.lexists(directory / ADAPTER_FILE):
        raise CheckpointError(
            f"{directory}: there is an {ADAPTER_FILE} in it, of weights that change a model's (PEFT), which is not read; merge "
            "both with merge_and_unload() and save_pretrained, or take the adapter away"
        )
    hf_config = _read_json_object(directory / "config.json")
    check_hf_config(hf_config, str(directory / "config.json"))
    try:
        family = family_named(str(hf_config.get("model_type")))
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    try:
        config = config_from_hf(hf_config, family)
        tensors = _read_all_tensors(directory, family)
        refuse_unsound(tensors)
        config = _drop_tied_copies(config, tensors, family.tied_copies, say)
        _note_dtype(hf_config, tensors, say)
        return _convert_tensors(hf_config, family, config, tensors, say)
    except CheckpointError as error:
        raise error if str(directory) in str(error) else CheckpointError(f"{directory}: {error}") from error


def _drop_tied_copies(
    config: ModelConfig, tensors: dict[str, Tensor], copies: Mapping[str, str], say: Callable[[str], None]
) -> ModelConfig:
    """Take the copies of tied tensors out of `tensors`.

    Args:
        config: resolved.
        tensors: of the directory, by their names there.
        copies: the name of each copy -> that of its original.
        say: is told where a GPT is read as untied.

    Returns:
        The configuration, untied where the copy of the embedding differs from it. So does transformers 5: where the file has
        both and they differ, it uses both.
    """
    for copy, original in copies.items() if not config.untie_embeddings_and_output_weights else ():
        if copy not in tensors:
            continue
        if original not in tensors:  # safetensors keeps one name alone of tensors that share their memory
            tensors[original] = tensors.pop(copy)
        elif _same_tensor(tensors[copy], tensors[original]):
            del tensors[copy]
        elif config.architecture == "bert":
            raise CheckpointError(f"{copy} differs from {original}; the model here has one tensor for both")
        else:
            say(f"config.json ties the output layer to the embedding, but {copy} differs from {original}: it is read as untied")
            return replace(config, untie_embeddings_and_output_weights=True)
    return config


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same numbers; a copy may have been saved in another type."""
    if one.dtype != other.dtype:
        one, other = one.double(), other.double()
    return one.shape == other.shape and torch.equal(one, other)


def _note_dtype(hf_config: Mapping[str, Any], tensors: Mapping[str, Tensor], say: Callable[[str], None]) -> None:
    """Say where transformers 5 would round the tensors as it opens them, to the type that config.json names."""
    if (name := saved_dtype(hf_config)) is None:
        return
    to = getattr(torch, name)
    if lost := sorted({str(t.dtype) for t in tensors.values() if torch.promote_types(t.dtype, to) != to}):
        say(f"config.json says {name}, and tensors are {', '.join(lost).replace('torch.', '')}: they are kept as they are")


def _convert_tensors(
    hf_config: Mapping[str, Any], family: HFFamily, config: ModelConfig, tensors: dict[str, Tensor], say: Callable[[str], None]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Convert the tensors of a directory to ours by the table of the class that it was saved from.

    Returns:
        The configuration with what the tensors say of it, and the weights under our names.

    Raises:
        CheckpointError: for a tensor that is absent, is left over, or has a shape that does not fit config.json.
    """
    config, saved_from = family.class_from_tensors(config, tensors, hf_config)
    weights: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in saved_from.mappings(config):
        if row.native == "head.weight" and config.ties_embeddings:
            continue  # it is the embedding
        if row.native.endswith(".bias") and not config.add_bias_linear and row.zeros_shape is None:
            continue
        if lacking := [name for name in row.hf if name not in tensors]:
            raise CheckpointError(
                f"there is no tensor {lacking[0]}, which {saved_from.architecture} has; save it from that class"
            )
        parts = {name: tensors[name] for name in row.hf}
        for name in zero_matrices(parts) if row.zeros_shape is None else ():
            say(f"{name} is all zeros; was the model saved whole?")
        try:
            weights[row.native] = row.conversion.from_hf(tuple(parts.values()), config).contiguous()
        except RuntimeError as error:
            raise CheckpointError(f"{row.hf[0]}: its shape does not fit config.json") from error
        used |= set(row.hf)
    if left := sorted(tensors.keys() - used):
        raise CheckpointError(
            f"{saved_from.architecture} has no tensor {', '.join(left[:10])}; it is another model than config.json says"
        )
    return config, weights


def _check_directory(directory: Path) -> None:
    """Raise CheckpointError where there is no such directory, or where it is that of the hub's cache above the model's."""
    if (why := why_not_weights(directory, "Hugging Face")) is not None:
        raise CheckpointError(f"{directory}: {why}")


def _read_json_object(path: Path, max_bytes: int = MAX_SETTINGS_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file of the directory. CheckpointError when there is none, or it is no file of JSON."""
    try:
        values = read_json(path, max_bytes)
    except FileNotFoundError as error:
        # In the hub's cache files are links; one that leads nowhere is there all the same.
        why = f"{path} is {error.strerror}" if path.is_symlink() else f"there is no {path.name} in it"
        raise CheckpointError(f"{path.parent}: {why}") from error
    except (OSError, ValueError) as error:
        if (kind := recognize_file(path)) is not None:
            raise CheckpointError(f"{path}: it is {kind}") from error
        raise CheckpointError(f"{path}: not readable: {error_reason(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    with open_regular(path) as file:
        if file.read(len(BOM_UTF8)) == BOM_UTF8:
            raise CheckpointError(f"{path}: it begins with a byte-order mark, which transformers refuses; save it without")
    return values


def _read_all_tensors(directory: Path, family: HFFamily) -> dict[str, Tensor]:
    """Read all tensors of the directory, without the constants, and with the prefix that a model without its head lacks."""
    tensors: dict[str, Tensor] = {}
    for name in _tensor_files(directory):
        in_file = _read_file(directory / name)
        if twice := sorted(key for key in in_file.keys() & tensors.keys() if not _same_tensor(in_file[key], tensors[key])):
            raise CheckpointError(f"{directory / name}: {twice[0]} is another one in a file before it; which is right?")
        tensors |= in_file
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(family.constant_suffixes)}
    if not any(key.startswith(family.tensor_prefix) for key in tensors):
        # GPT2Model writes `wte.weight` where GPT2LMHeadModel writes `transformer.wte.weight`; a head has no prefix in either.
        prefix, heads = family.tensor_prefix, family.head_prefixes
        tensors = {key if key.startswith(heads) else prefix + key: tensor for key, tensor in tensors.items()}
    return tensors


def _tensor_files(directory: Path) -> list[str]:
    """Return the names of the directory's safetensors files: the single one, or those that the index names."""
    if os.path.lexists(directory / "model.safetensors"):
        return ["model.safetensors"]
    if os.path.lexists(directory / INDEX_FILE):
        weight_map = _read_json_object(directory / INDEX_FILE, MAX_INDEX_BYTES).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else ()
        # A name with a folder in it could lead out of the directory.
        names = sorted({name for name in files if isinstance(name, str) and Path(name).name == name})
        if not names or any(name not in names for name in files):
            raise CheckpointError(f"{directory / INDEX_FILE}: its weight_map does not name files of this directory")
        return names
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    why = f"{pickled[0]} is a pickle, which can run code, and is not read" if pickled else "there is no model.safetensors"
    raise CheckpointError(f"{directory}: {why}; open the model with transformers and save_pretrained it, to have safetensors")


def _read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file, by their names there. CheckpointError when it cannot be read."""
    try:
        check_regular(path)
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
    except Exception as error:  # the package raises its own kind and others
        if is_lfs_pointer(path):
            raise CheckpointError(f"{path}: it is {LFS_POINTER}") from error
        raise CheckpointError(f"{path}: not a readable safetensors file: {error_reason(error)}") from error
