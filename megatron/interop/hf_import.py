"""Read a Hugging Face directory as our configuration and weights, by the tables of families/.

The files are `config.json` and one safetensors file, or several with an index. Values that the model here does not support are
refused by the name of their field, and so are tensors that cannot be trained weights. If a file contains both of two tied
tensors, they are compared.
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
    """Read the configuration and the weights of a directory that transformers wrote.

    Args:
        directory: the directory with `config.json` and the safetensors files.
        say: receives each line about a contradiction between the files and how it was resolved, and about all-zero matrices.

    Returns:
        The resolved configuration, and the whole tensors under our names in the dtypes of the files.

    Raises:
        CheckpointError: the model cannot be imported; the message names the field, the tensor or the file.
    """
    _check_directory(directory)
    if os.path.lexists(directory / ADAPTER_FILE):
        raise CheckpointError(
            f"{directory}: there is an {ADAPTER_FILE} in it, and PEFT adapters are not imported; merge adapter and model "
            "with merge_and_unload() and save_pretrained(), or remove the adapter's files"
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
    """Remove the copies of tied tensors from `tensors`.

    Args:
        config: the resolved configuration.
        tensors: the directory's tensors by their names there.
        copies: the name of each copy -> the name of the tensor that it is tied to.
        say: receives a line if a GPT is read as untied.

    Returns:
        The configuration; untied if the output layer differs from the embedding. transformers 5 also uses both tensors then.
    """
    for copy, original in copies.items() if not config.untie_embeddings_and_output_weights else ():
        if copy not in tensors:
            continue
        if original not in tensors:  # transformers saves tensors that share memory under one name only
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
    """Return whether two tensors have the same shape and the same values; their dtypes may differ."""
    if one.dtype != other.dtype:
        one, other = one.double(), other.double()
    return one.shape == other.shape and torch.equal(one, other)


def _note_dtype(hf_config: Mapping[str, Any], tensors: Mapping[str, Tensor], say: Callable[[str], None]) -> None:
    """Report tensors that transformers 5 would round to the dtype in config.json when it opens the directory."""
    if (name := saved_dtype(hf_config)) is None:
        return
    dtype = getattr(torch, name)
    if wider := sorted({str(t.dtype) for t in tensors.values() if torch.promote_types(t.dtype, dtype) != dtype}):
        say(f"config.json says {name}, and tensors are {', '.join(wider).replace('torch.', '')}: they are kept as they are")


def _convert_tensors(
    hf_config: Mapping[str, Any], family: HFFamily, config: ModelConfig, tensors: dict[str, Tensor], say: Callable[[str], None]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Convert the tensors of a directory to ours by the table of the class that it was saved from.

    Returns:
        The configuration completed with what the tensors show, and the weights under our names.

    Raises:
        CheckpointError: a tensor is missing, is not part of the class, or has a shape that does not fit config.json.
    """
    config, saved_from = family.class_from_tensors(config, tensors, hf_config)
    weights: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in saved_from.mappings(config):
        if row.native == "head.weight" and config.ties_embeddings:
            continue  # tied to the embedding
        if row.native.endswith(".bias") and not config.add_bias_linear and row.zeros_shape is None:
            continue
        if missing := [name for name in row.hf if name not in tensors]:
            raise CheckpointError(
                f"there is no tensor {missing[0]}, which {saved_from.architecture} has; save it from that class"
            )
        parts = {name: tensors[name] for name in row.hf}
        for name in zero_matrices(parts) if row.zeros_shape is None else ():
            say(f"{name} is all zeros; was the model saved completely?")
        try:
            weights[row.native] = row.conversion.from_hf(tuple(parts.values()), config).contiguous()
        except RuntimeError as error:
            raise CheckpointError(f"{row.hf[0]}: its shape does not fit config.json") from error
        used |= set(row.hf)
    if left := sorted(tensors.keys() - used):
        raise CheckpointError(
            f"{saved_from.architecture} has no tensor {', '.join(left[:10])}; config.json describes another model"
        )
    return config, weights


def _check_directory(directory: Path) -> None:
    """Raise CheckpointError if the directory does not exist, or is not one that holds a model, such as the hub's cache."""
    if (reason := why_not_weights(directory, "Hugging Face")) is not None:
        raise CheckpointError(f"{directory}: {reason}")


def _read_json_object(path: Path, max_bytes: int = MAX_SETTINGS_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file. CheckpointError if the file is missing, unreadable or does not contain one."""
    try:
        values = read_json(path, max_bytes)
    except FileNotFoundError as error:
        # Files in the hub's cache are symlinks, so name a dangling one instead of calling the file missing.
        reason = f"{path} is {error.strerror}" if path.is_symlink() else f"there is no {path.name} in it"
        raise CheckpointError(f"{path.parent}: {reason}") from error
    except (OSError, ValueError) as error:
        if (kind := recognize_file(path)) is not None:
            raise CheckpointError(f"{path}: it is {kind}") from error
        raise CheckpointError(f"{path}: not readable: {error_reason(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    with open_regular(path) as file:
        if file.read(len(BOM_UTF8)) == BOM_UTF8:
            raise CheckpointError(f"{path}: it begins with a byte-order mark, which transformers refuses; save it without one")
    return values


def _read_all_tensors(directory: Path, family: HFFamily) -> dict[str, Tensor]:
    """Read all tensors of the directory except constants, and add the prefix that names lack in a model without its head."""
    tensors: dict[str, Tensor] = {}
    for name in _tensor_files(directory):
        in_file = _read_file(directory / name)
        if differing := sorted(key for key in in_file.keys() & tensors.keys() if not _same_tensor(in_file[key], tensors[key])):
            raise CheckpointError(f"{directory / name}: {differing[0]} has other values in another file of the directory")
        tensors |= in_file
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(family.constant_suffixes)}
    if not any(key.startswith(family.tensor_prefix) for key in tensors):
        # GPT2Model writes `wte.weight` where GPT2LMHeadModel writes `transformer.wte.weight`; a head has no prefix in either.
        prefix, heads = family.tensor_prefix, family.head_prefixes
        tensors = {key if key.startswith(heads) else prefix + key: tensor for key, tensor in tensors.items()}
    return tensors


def _tensor_files(directory: Path) -> list[str]:
    """Return the names of the directory's safetensors files: model.safetensors if it exists, else those in the index."""
    if os.path.lexists(directory / "model.safetensors"):
        return ["model.safetensors"]
    if os.path.lexists(directory / INDEX_FILE):
        weight_map = _read_json_object(directory / INDEX_FILE, MAX_INDEX_BYTES).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else ()
        # A name with a path in it could point outside the directory.
        names = sorted({name for name in files if isinstance(name, str) and Path(name).name == name})
        if not names or any(name not in names for name in files):
            raise CheckpointError(f"{directory / INDEX_FILE}: its weight_map does not name files of this directory")
        return names
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    reason = f"{pickled[0]} is a pickle, which can run code, and is not read" if pickled else "there is no model.safetensors"
    raise CheckpointError(
        f"{directory}: {reason}; to get safetensors, open the model with transformers and save it with save_pretrained()"
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file by their names there. CheckpointError if it cannot be read."""
    try:
        check_regular(path)
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    except Exception as error:  # safetensors raises its own exception type and others
        if is_lfs_pointer(path):
            raise CheckpointError(f"{path}: it is {LFS_POINTER}") from error
        raise CheckpointError(f"{path}: not a readable safetensors file: {error_reason(error)}") from error
