"""A checkpoint as the weights and configuration of a Hugging Face directory, tensor by tensor.

Written are `config.json`, `generation_config.json` and `model.safetensors`, or `model-00001-of-0000N.safetensors` with
`model.safetensors.index.json`. The tokenizer's files come from whoever holds the tokenizer.
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
from megatron.checkpoint.model_config import model_config
from megatron.checkpoint.storage import TORCH_DTYPES, Entry, Storage, safetensors
from megatron.config.schema import ModelConfig
from megatron.interop.families.family import HFClass
from megatron.interop.families.table import family_of
from megatron.interop.tensor_mapping import Row

PREFIX = "model."
SHARD_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Group:
    """What one of our tensors becomes; kept in one file, so that it is read once."""

    entries: tuple[Entry, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors of the group."""
        return sum(e.bytes for e in self.entries)


class _Source:
    """One row applied to the checkpoint. The result of the last call is kept until all of its tensors were taken."""

    def __init__(self, make: Callable[[], tuple[Tensor, ...]], names: tuple[str, ...]) -> None:
        self.make, self.names = make, names
        self.made: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        if name not in self.made:
            self.made = dict(zip(self.names, self.make(), strict=True))
        return self.made.pop(name)


def plan(directory: Path, manifest: Manifest, config: ModelConfig, written_as: HFClass, dtype: torch.dtype) -> list[Group]:
    """Every tensor of the export in the class's order. CheckpointError when the two sets of tensors do not match."""
    groups: list[Group] = []
    rows = list(written_as.table(config))
    ours = {name.removeprefix(PREFIX) for name in manifest.tensors if name.startswith(PREFIX)}
    if left := sorted(ours - {row.ours for row in rows}):
        raise CheckpointError(f"{directory}: {written_as.architecture} has no place for {', '.join(left[:20])}")
    tied = config.ties_embeddings
    needed = (row.ours for row in rows if not row.ours.endswith(".bias") and not (tied and row.ours == "head.weight"))
    if lacking := sorted({name for name in needed if name not in ours} - {row.ours for row in rows if row.zeros}):
        raise CheckpointError(f"{directory}: its config.json asks for tensors that it does not hold: {', '.join(lacking[:20])}")
    for row in rows:
        if row.ours not in ours and row.zeros is None:
            continue
        record = manifest.tensors.get(PREFIX + row.ours)
        shape = record.shape if record is not None else row.zeros(config) if row.zeros is not None else ()
        try:
            forms = row.form.write(torch.empty(shape, device="meta"), config)
        except RuntimeError as error:
            raise CheckpointError(f"{directory}: {row.ours} of shape {shape} does not fit its config.json") from error
        source = _Source(_maker(directory, manifest, config, row, shape, dtype), row.theirs)
        shapes = zip(row.theirs, forms, strict=True)
        groups.append(Group(tuple(Entry(n, dtype, tuple(form.shape), partial(source.take, n)) for n, form in shapes)))
    return groups


def _maker(
    directory: Path, manifest: Manifest, config: ModelConfig, row: Row, shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[], tuple[Tensor, ...]]:
    def make() -> tuple[Tensor, ...]:
        if PREFIX + row.ours not in manifest.tensors:
            return row.form.write(torch.zeros(shape, dtype=dtype), config)
        tensor = read_tensor(directory, manifest, PREFIX + row.ours).float()
        if tensor.isfinite().all() and not tensor.to(dtype).isfinite().all():
            raise CheckpointError(f"{row.ours} has values up to {tensor.abs().max():g}, too large for {dtype}; choose another")
        return tuple(t.to(dtype) for t in row.form.write(tensor, config))

    return make


def files_for(groups: list[Group], limit: int) -> list[list[Group]]:
    """Groups packed in order into files of at most `limit` bytes; a group that is larger stands alone."""
    files: list[list[Group]] = []
    room = 0
    for group in groups:
        if not files or group.bytes > room:
            files.append([])
            room = limit
        files[-1].append(group)
        room -= group.bytes
    return files


def export_hf(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    model_type: str | None = None,
    special: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] = MappingProxyType({}),
    shard_bytes: int = SHARD_BYTES,
) -> torch.dtype:
    """Write weights and configuration of a checkpoint directory into `out`, which is created. Returns the type written.

    dtype: of the tensors; default the narrowest that rounds none of the saved ones. model_type: of the family to write, where
    it can express the model; default the first that can. special: what config.json says of special tokens, such as
    `eos_token_id`: an id, several, or None; default None for `bos`, `eos` and `pad`. generation: what generation_config.json
    says beside them.
    One of our tensors at a time is in memory. CheckpointError when the checkpoint is damaged, or when no family of
    transformers has its architecture: then with everything that stands in the way.
    """
    config, manifest = model_config(checkpoint), verify(checkpoint)
    try:
        family = family_of(config, model_type)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    written_as = family.written_class(config)
    if PREFIX + "embedding.word.weight" not in manifest.tensors:
        raise CheckpointError(f"{checkpoint}: it holds no model, there is no {PREFIX}embedding.word.weight")
    held = [TORCH_DTYPES[record.dtype] for name, record in manifest.tensors.items() if name.startswith(PREFIX)]
    dtype = dtype or reduce(torch.promote_types, held)
    storage = Storage()
    write_files(storage, out, plan(checkpoint, manifest, config, written_as, dtype), shard_bytes)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) if special is None else special
    about = {
        "architectures": [written_as.architecture],
        "model_type": family.model_type,
        **family.config(config),
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "initializer_range": config.init_method_std,
        "torch_dtype": str(dtype).removeprefix("torch."),  # the spelling that Transformers 4 and 5 both read
        "use_cache": True,
        **ids,
    }
    write_json(storage, out / "config.json", about)
    write_json(storage, out / "generation_config.json", {k: v for k, v in ids.items() if v is not None} | dict(generation))
    return dtype


def write_files(storage: Storage, out: Path, groups: list[Group], limit: int) -> None:
    """Write tensors as one safetensors file in `out`, which is created.

    Where they have more than `limit` bytes, they become several files with an index.
    """
    files = files_for(groups, limit)
    storage.make_directory(out)
    where: dict[str, str] = {}
    for i, held in enumerate(files):
        name = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        entries = [entry for group in held for entry in group.entries]
        storage.write(out / name, safetensors(entries, {"format": "pt"}))
        where |= {entry.key: name for entry in entries}
    if len(files) > 1:
        total = sum(group.bytes for group in groups)
        write_json(storage, out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def write_json(storage: Storage, path: Path, values: Mapping[str, Any]) -> None:
    """A file of JSON as transformers writes it."""
    storage.write(path, [(json.dumps(values, indent=2) + "\n").encode()])
