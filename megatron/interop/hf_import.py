"""A Hugging Face directory as our configuration and weights: the tables of hf_families.py read backwards.

Read are `config.json` and safetensors files, one or several with an index. What the model here does not have is refused by its
name, and so are tensors that no trained model has. A matrix that transformers ties to another and that a file holds as well is
compared with it.
"""

from __future__ import annotations

import os
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron.checkpoint.layout import CheckpointError
from megatron.config.schema import ModelConfig
from megatron.config.task import TASKS
from megatron.files.foreign import POINTER, foreign_file, is_pointer, unfit_directory
from megatron.files.regular import MAX_INDEX_BYTES, MAX_SETTINGS_BYTES, check_regular, open_regular, read_json, reason
from megatron.interop.foreign_numbers import check_config
from megatron.interop.hf_config import CONFIG_READERS, architecture, class_names, model_settings, saved_dtype
from megatron.interop.hf_families import FINE_TUNED, GPT2, LLAMA, MEGATRON_BERT, MEGATRON_BERT_WORDS
from megatron.interop.soundness import refuse_unsound, zero_matrices
from megatron.interop.tensor_mapping import Family

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# Constants that older versions of transformers saved beside the weights.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".embeddings.position_ids")


@dataclass(frozen=True)
class TensorReader:
    """The way in which the tensors of one `model_type` are read.

    prefix: of the names of a directory that holds the model without its head; it lacks there. copies: a tensor that
    transformers ties to another -> that other one.
    """

    prefix: str
    copies: Mapping[str, str]


_LLAMA = TensorReader("model.", MappingProxyType({"lm_head.weight": "model.embed_tokens.weight"}))
TENSOR_READERS: Mapping[str, TensorReader] = MappingProxyType(
    {
        "gpt2": TensorReader("transformer.", MappingProxyType({"lm_head.weight": "transformer.wte.weight"})),
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "megatron-bert": TensorReader(
            "bert.",
            MappingProxyType(
                {
                    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                    "cls.predictions.decoder.bias": "cls.predictions.bias",
                }
            ),
        ),
    }
)


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
    kind = str(about.get("model_type"))
    if kind == "bert":
        raise CheckpointError(
            f"{directory}: `model_type` is 'bert', whose layer norms follow each layer; here they come first, as in "
            "'megatron-bert', and weights of the one make no sense in the other"
        )
    if kind not in CONFIG_READERS:
        raise CheckpointError(f"{directory}: `model_type` is {kind!r}; known are {', '.join(sorted(CONFIG_READERS))}")
    try:
        config = model_settings(about, CONFIG_READERS[kind])
        found = _tensors(directory, TENSOR_READERS[kind].prefix)
        refuse_unsound(found)
        config = _without_copies(config, found, TENSOR_READERS[kind].copies, say)
        _tell_of_dtype(about, found, say)
        return _read(about, config, found, say)
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
    about: Mapping[str, Any], config: ModelConfig, found: dict[str, Tensor], say: Callable[[str], None]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    family = GPT2 if config.position_embedding_type == "learned_absolute" else LLAMA
    if config.architecture == "bert":
        config, family = _bert_family(config, found, about)
    weights: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in family.table(config):
        if row.ours == "head.weight" and config.tied:
            continue
        if row.ours.endswith(".bias") and not config.add_bias_linear and row.zeros is None:
            continue
        if lacking := [name for name in row.theirs if name not in found]:
            raise CheckpointError(f"there is no tensor {lacking[0]}, which {family.architecture} has; save it from that class")
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
            f"{family.architecture} has no tensor {', '.join(left[:10])}; it is another model than config.json says"
        )
    return config, weights


def _bert_family(config: ModelConfig, found: dict[str, Tensor], about: Mapping[str, Any]) -> tuple[ModelConfig, Family]:
    """Fine-tuned, with the binary head, or without. Without it the model here has no token types; then those there must mean
    nothing."""
    named = architecture(about)
    head = next((head for head, family in FINE_TUNED.items() if family.architecture == named), None)
    if head is not None:
        return replace(config, task_head=head, labels=_labels(head, found, about)), FINE_TUNED[head]
    pooled = any(name.startswith(("bert.pooler.", "cls.seq_relationship.")) for name in found)
    if pooled or named == MEGATRON_BERT.architecture:
        return config, MEGATRON_BERT
    types = found.get("bert.embeddings.token_type_embeddings.weight")
    if types is not None and types.any():
        raise CheckpointError(
            "it has token types and no cls.seq_relationship; open it as MegatronBertForPreTraining and save it, and import that"
        )
    rows = tuple(row for row in MEGATRON_BERT_WORDS.rows if row.ours != "embedding.segment.weight")
    found.pop("bert.embeddings.token_type_embeddings.weight", None)
    family = Family(MEGATRON_BERT_WORDS.architecture, rows, MEGATRON_BERT_WORDS.obstacles, MEGATRON_BERT_WORDS.config)
    return replace(config, bert_binary_head=False), family


def _labels(head: str, found: Mapping[str, Tensor], about: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes that a head tells apart. CheckpointError where its tensors have another number of them."""
    if head == "choice":  # transformers knows no number of choices
        return TASKS["RACE"].labels
    names = class_names(about)
    outputs = found.get("qa_outputs.weight" if head == "span" else "classifier.weight", torch.empty(0)).shape[:1]
    if outputs and outputs[0] != len(names):
        raise CheckpointError(f"config.json has {len(names)} classes (`id2label`, `num_labels`), the head {outputs[0]}")
    if head == "classification" and (about.get("problem_type") not in (None, "single_label_classification") or len(names) < 2):
        asked = about.get("problem_type") or "regression, of one number"
        raise CheckpointError(f"`problem_type` is {asked!r}; the model here tells classes apart, one of each sample")
    return () if head == "span" else names


def _check_directory(directory: Path) -> None:
    """CheckpointError where there is no such directory, or where it is that of the hub's cache above the model's."""
    if (why := unfit_directory(directory, "Hugging Face")) is not None:
        raise CheckpointError(f"{directory}: {why}")


def _json(path: Path, max_bytes: int = MAX_SETTINGS_BYTES) -> dict[str, Any]:
    try:
        values = read_json(path, max_bytes)
    except FileNotFoundError as error:
        why = f"{path} is {error.strerror}" if path.is_symlink() else f"there is no {path.name} in it"
        raise CheckpointError(f"{path.parent}: {why}") from error
    except (OSError, ValueError) as error:
        if (found := foreign_file(path)) is not None:
            raise CheckpointError(f"{path}: it is {found}") from error
        raise CheckpointError(f"{path}: not readable: {reason(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    with open_regular(path) as file:
        if file.read(len(BOM_UTF8)) == BOM_UTF8:
            raise CheckpointError(f"{path}: it begins with a byte-order mark, which transformers refuses; save it without")
    return values


def _tensors(directory: Path, prefix: str) -> dict[str, Tensor]:
    """All tensors in the directory's safetensors files, without the constants, with the prefix that a bare model lacks."""
    found: dict[str, Tensor] = {}
    for name in _tensor_files(directory):
        tensors = _read_tensors(directory / name)
        if twice := sorted(key for key in tensors.keys() & found.keys() if not _equal(tensors[key], found[key])):
            raise CheckpointError(f"{directory / name}: {twice[0]} is another one in a file before it; which is right?")
        found |= tensors
    found = {key: tensor for key, tensor in found.items() if not key.endswith(BUFFERS)}
    if not any(key.startswith(prefix) for key in found):
        found = {key if key.startswith(("lm_head.", "cls.")) else prefix + key: tensor for key, tensor in found.items()}
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
        if is_pointer(path):
            raise CheckpointError(f"{path}: it is {POINTER}") from error
        raise CheckpointError(f"{path}: not a readable safetensors file: {reason(error)}") from error
