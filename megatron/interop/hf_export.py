"""Write the weights and the configuration of a checkpoint as a Hugging Face directory, tensor by tensor.

The files are `config.json`, `generation_config.json` and `model.safetensors`, or `model-00001-of-0000N.safetensors` with
`model.safetensors.index.json`. The tokenizer's files are written elsewhere, see checked_export.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.layout import CheckpointError, Manifest, verify
from megatron.checkpoint.load import read_tensor
from megatron.checkpoint.model_config import read_model_config
from megatron.checkpoint.storage import DTYPE_FROM_CODE, Storage, TensorEntry, stream_safetensors
from megatron.config.schema import ModelConfig
from megatron.interop.families.family import HFClass
from megatron.interop.families.table import family_for_export
from megatron.interop.tensor_mapping import TensorMapping

MODEL_PREFIX = "model."
SHARD_BYTES = 2_000_000_000  # the most bytes of tensors in one file


@dataclass(frozen=True)
class TensorGroup:
    """The tensors that one of ours is converted to; they are written to one file, so that ours is read once."""

    entries: tuple[TensorEntry, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors of the group."""
        return sum(e.bytes for e in self.entries)


class _ConvertedTensor:
    """The tensors that one of ours is converted to, computed when the first is taken; each is freed when it is taken."""

    def __init__(self, convert: Callable[[], tuple[Tensor, ...]], names: tuple[str, ...]) -> None:
        self.convert, self.names = convert, names
        self.converted: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """Return one of the tensors, and drop the reference to it."""
        if name not in self.converted:
            self.converted = dict(zip(self.names, self.convert(), strict=True))
        return self.converted.pop(name)


def plan_tensors(
    directory: Path, manifest: Manifest, config: ModelConfig, hf_class: HFClass, dtype: torch.dtype
) -> list[TensorGroup]:
    """Return every tensor of the export, in the order of the class's table, without reading any.

    Args:
        directory: the checkpoint's iter_ directory.
        manifest: the checkpoint's manifest.
        config: the checkpoint's resolved configuration.
        hf_class: the class of transformers to write, with its table of tensors.
        dtype: the dtype of the written tensors.

    Raises:
        CheckpointError: the tensors of the checkpoint are not those of the table.
    """
    groups: list[TensorGroup] = []
    rows = list(hf_class.mappings(config))
    native = {name.removeprefix(MODEL_PREFIX) for name in manifest.tensors if name.startswith(MODEL_PREFIX)}
    if left := sorted(native - {row.native for row in rows}):
        raise CheckpointError(f"{directory}: {hf_class.architecture} has no place for {', '.join(left[:20])}")
    tied = config.ties_embeddings
    # A bias may be absent from the checkpoint: zeros are written if the class always has it, nothing if it is optional.
    required = (row.native for row in rows if not row.native.endswith(".bias") and not (tied and row.native == "head.weight"))
    if missing := sorted({name for name in required if name not in native} - {row.native for row in rows if row.zeros_shape}):
        raise CheckpointError(f"{directory}: it lacks tensors that its config.json asks for: {', '.join(missing[:20])}")
    for row in rows:
        if row.native not in native and row.zeros_shape is None:
            continue
        record = manifest.tensors.get(MODEL_PREFIX + row.native)
        shape = record.shape if record is not None else row.zeros_shape(config) if row.zeros_shape is not None else ()
        try:
            tensors = row.conversion.to_hf(torch.empty(shape, device="meta"), config)  # only shapes
        except RuntimeError as error:
            raise CheckpointError(f"{directory}: {row.native} of shape {shape} does not fit its config.json") from error
        converted = _ConvertedTensor(_converter(directory, manifest, config, row, shape, dtype), row.hf)
        named = zip(row.hf, tensors, strict=True)
        groups.append(
            TensorGroup(tuple(TensorEntry(name, dtype, tuple(t.shape), partial(converted.take, name)) for name, t in named))
        )
    return groups


def _converter(
    directory: Path, manifest: Manifest, config: ModelConfig, row: TensorMapping, shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that reads one tensor of the checkpoint, or zeros of `shape` if it is absent, and converts it."""

    def convert() -> tuple[Tensor, ...]:
        if MODEL_PREFIX + row.native not in manifest.tensors:
            return row.conversion.to_hf(torch.zeros(shape, dtype=dtype), config)
        tensor = read_tensor(directory, manifest, MODEL_PREFIX + row.native).float()
        # Overflow of the requested dtype is an error; values that are infinite in the checkpoint already are written unchanged.
        if tensor.isfinite().all() and not tensor.to(dtype).isfinite().all():
            raise CheckpointError(
                f"{row.native} has values up to {tensor.abs().max():g}, too large for {dtype}; choose another type"
            )
        return tuple(t.to(dtype) for t in row.conversion.to_hf(tensor, config))

    return convert


def pack_into_files(groups: list[TensorGroup], limit: int) -> list[list[TensorGroup]]:
    """Distribute groups in order over files of at most `limit` bytes; a larger group has a file of its own."""
    files: list[list[TensorGroup]] = []
    space_left = 0
    for group in groups:
        if not files or group.bytes > space_left:
            files.append([])
            space_left = limit
        files[-1].append(group)
        space_left -= group.bytes
    return files


def export_weights(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    model_type: str | None = None,
    token_ids: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] = MappingProxyType({}),
    shard_bytes: int = SHARD_BYTES,
) -> torch.dtype:
    """Write the weights and the configuration of a checkpoint as a Hugging Face directory.

    Only one of the checkpoint's tensors is in memory at a time.

    Args:
        checkpoint: an iter_ directory.
        out: the directory to create.
        dtype: the dtype of the written tensors; None for the narrowest that represents all saved ones exactly.
        model_type: the family to write, if it can express the model; by default the first family that can.
        token_ids: fields of config.json about special tokens, such as `eos_token_id`: an id, a list of ids, or None. By
            default `bos_token_id`, `eos_token_id` and `pad_token_id` are None.
        generation: further fields of generation_config.json.
        shard_bytes: the most bytes of tensors in one file.

    Returns:
        The dtype of the written tensors.

    Raises:
        CheckpointError: the checkpoint is damaged, or no family can express its model; the message then gives all reasons.
    """
    config, manifest = read_model_config(checkpoint), verify(checkpoint)
    try:
        family = family_for_export(config, model_type)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    hf_class = family.exported_class(config)
    if MODEL_PREFIX + "embedding.word.weight" not in manifest.tensors:
        raise CheckpointError(f"{checkpoint}: it holds no model, there is no {MODEL_PREFIX}embedding.word.weight")
    dtypes = [DTYPE_FROM_CODE[record.dtype] for name, record in manifest.tensors.items() if name.startswith(MODEL_PREFIX)]
    dtype = dtype or reduce(torch.promote_types, dtypes)
    storage = Storage()
    write_tensor_files(storage, out, plan_tensors(checkpoint, manifest, config, hf_class, dtype), shard_bytes)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) if token_ids is None else token_ids
    hf_config = {
        "architectures": [hf_class.architecture],
        "model_type": family.model_type,
        **family.to_fields(config),
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "initializer_range": config.init_method_std,
        "torch_dtype": str(dtype).removeprefix("torch."),  # the older name, which Transformers 4 and 5 both read
        "use_cache": True,
        **ids,
    }
    write_json(storage, out / "config.json", hf_config)
    write_json(storage, out / "generation_config.json", {k: v for k, v in ids.items() if v is not None} | dict(generation))
    return dtype


def write_tensor_files(storage: Storage, out: Path, groups: list[TensorGroup], limit: int) -> None:
    """Write tensors as one safetensors file, or as several with an index.

    Args:
        storage: writes the files.
        out: the directory to create.
        groups: the tensors in order; a group is never divided between files.
        limit: the most bytes of tensors in one file.
    """
    files = pack_into_files(groups, limit)
    storage.make_directory(out)
    weight_map: dict[str, str] = {}  # name of a tensor -> name of its file
    for i, packed in enumerate(files):
        name = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        entries = [entry for group in packed for entry in group.entries]
        storage.write(
            out / name, stream_safetensors(entries, {"format": "pt"})
        )  # transformers 4 refuses a file without this format
        weight_map |= {entry.key: name for entry in entries}
    if len(files) > 1:
        total = sum(group.bytes for group in groups)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(storage, out / "model.safetensors.index.json", index)


def write_json(storage: Storage, path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as transformers does: indented by two, with a newline at its end.

    Args:
        storage: writes the file.
        path: the path of the file.
        values: the JSON object.
    """
    storage.write(path, [(json.dumps(values, indent=2) + "\n").encode()])
