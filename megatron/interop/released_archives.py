"""Convert the archives that NVIDIA released, GPT-2 345M and BERT 345M, to Hugging Face directories.

An archive is a zip with `release/mp_rank_00/model_optim_rng.pt` in it: one file of Megatron-LM, of any checkpoint_version. Most
lack the args of the training run. A model's sizes are therefore taken from its args, or else from `--config_file`, or else from
the tensors if these determine them; in any case they are compared with the tensors.

The files written beside the archive, `config.json` and `model.safetensors`, are those that the scripts of Transformers 4 wrote
(`convert_megatron_gpt2_checkpoint.py` and the one for BERT): the same defaults, and tensors in the archive's dtype.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.layout import CheckpointError
from megatron.checkpoint.storage import CODE_FROM_DTYPE, Storage, TensorEntry
from megatron.config.resolve import resolve_model
from megatron.config.schema import ModelConfig, ModelSettings
from megatron.files.regular import check_regular, error_reason, read_json
from megatron.interop.families.family import HFClass
from megatron.interop.families.megatron_bert import WITH_ORDER, WORDS_ALONE
from megatron.interop.families.shared import ACTIVATIONS
from megatron.interop.families.table import family_named
from megatron.interop.foreign_values import check_hf_config
from megatron.interop.hf_export import SHARD_BYTES, TensorGroup, write_json, write_tensor_files
from megatron.interop.megatron_args import NUMBER_ARGS, config_from_args
from megatron.interop.megatron_files import args_in_file, check_tied_copies, checkpoint_version
from megatron.interop.megatron_tensors import LayerSizes, Weights, cut_vocabulary, join_ranks, virtual_stages_in_file
from megatron.interop.released_kinds import BERT_KIND, GPT2_KIND, ReleasedKind
from megatron.interop.safe_pickle import read_pickled
from megatron.interop.weight_checks import zero_matrices

ARCHIVE_MEMBER = "release/mp_rank_00/model_optim_rng.pt"
REQUIRED_ARGS = ("num_layers", "hidden_size", "num_attention_heads")  # without any of these the args are ignored
REQUIRED_MATRICES = ("embedding.word.weight", "embedding.position.weight", "layers.0.mlp.up.weight")
MAX_RATIO = 20  # of the unpacked size to the packed size; weights shrink by less than half when they are packed
MAX_UNCHECKED_BYTES = 1 << 26  # of the unpacked size, whatever the ratio is
# Hidden size -> number of heads of the released models, for archives without args and --config_file.
HEADS_BY_HIDDEN_SIZE = MappingProxyType({1024: 16})


def read_archive(path: Path) -> dict[str, Any]:
    """Read the dictionary in an archive's ARCHIVE_MEMBER, or in a .pt file. CheckpointError if it is damaged or unsafe."""
    if path.is_dir():
        raise CheckpointError(f"{path}: this is a directory; give the archive or its .pt file, or use tools/import_megatron.py")
    try:
        check_regular(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: {error.strerror if path.is_symlink() else 'there is no such file'}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if zipfile.is_zipfile(path):  # also true of .pt files since torch 1.6
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                member = _unpack_member(archive) if ARCHIVE_MEMBER in names else None
        except (zipfile.BadZipFile, EOFError, RuntimeError, OSError, ValueError, zlib.error) as error:
            raise CheckpointError(f"{path}: {ARCHIVE_MEMBER} in it is damaged: {error}") from error
        if member is not None:
            return read_pickled(member, f"{path}: {ARCHIVE_MEMBER}")
    if path.suffix.lower() == ".zip":
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path}: not a complete zip archive; was the download cut short?")
        listed = ", ".join(names[:5]) or "nothing"
        raise CheckpointError(f"{path}: there is no {ARCHIVE_MEMBER} in it; it holds {listed}")
    return read_pickled(path, str(path))


def _unpack_member(archive: zipfile.ZipFile) -> bytes:
    """Return the bytes of ARCHIVE_MEMBER. CheckpointError, before anything is unpacked, for a zip bomb.

    Checking the size in the archive's directory suffices, because `zipfile` never unpacks more than that.
    """
    member = archive.getinfo(ARCHIVE_MEMBER)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(
            f"{archive.filename}: {ARCHIVE_MEMBER} is packed by method {member.compress_type}; unpack it and give the .pt file"
        )
    if member.file_size > MAX_RATIO * member.compress_size + MAX_UNCHECKED_BYTES:
        raise CheckpointError(
            f"{archive.filename}: {ARCHIVE_MEMBER} would unpack from {member.compress_size:,} bytes to {member.file_size:,}, "
            f"more than {MAX_RATIO} times as many; weights cannot be packed so small, so it may be made to fill the memory"
        )
    return archive.read(member)


def read_config_file(path: Path) -> dict[str, Any]:
    """Read the JSON object in --config_file. CheckpointError if the file cannot be read or contains none."""
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable config.json: {error_reason(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    check_hf_config(values, str(path))
    return values


@dataclass(frozen=True)
class ReleasedModel:
    """Content of an archive.

    Attributes:
        hf_config: the content of the config.json to write.
        config: the resolved configuration.
        weights: the whole tensors under our names.
        hf_class: the class of transformers that the model is written as.
    """

    hf_config: dict[str, Any]
    config: ModelConfig
    weights: Weights
    hf_class: HFClass


def model_from_archive(
    file: Mapping[str, Any], kind: ReleasedKind, config_file: Mapping[str, Any] | None, say: Callable[[str], None] = print
) -> ReleasedModel:
    """Return the model in an archive.

    Args:
        file: the dictionary in the archive, as `read_archive` returns it.
        kind: the expected kind of model.
        config_file: the JSON object in --config_file, None without it.
        say: receives each line about an assumption that was made.

    Raises:
        CheckpointError: settings and tensors disagree, or the model is of another kind.
    """
    args, version = args_in_file(file), checkpoint_version(file, "the checkpoint")
    stage = _only_stage(file, args)
    if any(args.get(name) is None for name in REQUIRED_ARGS):
        args = {}  # the args of the oldest archives do not describe the model
    # These tensors are used for their names and shapes only. Queries, keys and values are reordered below, when the number of
    # heads is known; version 2.0 means no reordering.
    tensors = join_ranks([stage], LayerSizes(1, 1, 1), 2.0)
    _check_kind(tensors, kind)
    hf_config = _build_hf_config(args, tensors, kind, config_file, say)
    config = _model_config(hf_config, args, tensors, kind)
    _check_sizes(config, tensors, kind)
    if args:
        _note_other_settings(args, config, hf_config, say)
    sizes = LayerSizes(config.num_attention_heads, 1, config.kv_channels)
    weights = cut_vocabulary(join_ranks([stage], sizes, version), config.known_vocab_size)
    for name in zero_matrices(weights):
        say(f"{name} is all zeros; was the model saved completely?")
    hf_class = _choose_class(kind, weights)
    hf_config["architectures"] = [hf_class.architecture]
    if config.untie_embeddings_and_output_weights:
        hf_config["tie_word_embeddings"] = False
    return ReleasedModel(hf_config, config, weights, hf_class)


def _only_stage(file: Mapping[str, Any], args: Mapping[str, Any]) -> list[Any]:
    """Return a list with the weights of the only rank. CheckpointError if the file is one of several ranks' files."""
    stages = virtual_stages_in_file(file, "the checkpoint")
    ranks = [args.get(f"{axis}_model_parallel_size") or 1 for axis in ("tensor", "pipeline")]
    if len(stages) > 1 or ranks != [1, 1]:
        raise CheckpointError("it is one rank's part of a model; use tools/import_megatron.py on the whole directory")
    check_tied_copies([stages])
    return stages


def _check_kind(tensors: Weights, kind: ReleasedKind) -> None:
    """Raise CheckpointError for a model of the other kind, and for an incomplete one."""
    if ("masked_words.dense.weight" in tensors) != (kind is BERT_KIND):
        other = GPT2_KIND if kind is BERT_KIND else BERT_KIND
        raise CheckpointError(f"it is not a {kind.name}; use {other.tool}")
    if any(name not in tensors or tensors[name].dim() != 2 for name in REQUIRED_MATRICES):
        raise CheckpointError(f"it holds no complete {kind.name}: it lacks word or position embeddings, or layers")


def _build_hf_config(
    args: Mapping[str, Any],
    tensors: Weights,
    kind: ReleasedKind,
    config_file: Mapping[str, Any] | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return the content of config.json. The args override --config_file or the tensors' sizes, and these the defaults."""
    if config_file is not None:
        hf_config = {**kind.defaults, **kind.default_sizes, **config_file}
    else:
        hf_config = {**kind.defaults, **({} if args else _sizes_from_tensors(tensors, kind, say))}
    hf_config |= {"architectures": kind.defaults["architectures"], "model_type": kind.defaults["model_type"]}
    if args:
        hf_config |= _fields_from_args(args, tensors, kind, config_file)
    if (
        hf_config.get(kind.size_fields["ffn_hidden_size"]) is None
        and type(width := hf_config[kind.size_fields["hidden_size"]]) is int
    ):
        hf_config[kind.size_fields["ffn_hidden_size"]] = 4 * width
    return hf_config


def write_hf_directory(model: ReleasedModel, kind: ReleasedKind, out: Path) -> None:
    """Write config.json and the weights.

    Args:
        model: the model, whose weights `check_weights` has accepted.
        kind: the model's kind.
        out: the output directory.
    """
    write_tensor_files(Storage(), out, _tensor_groups(model, kind), SHARD_BYTES)
    write_json(Storage(), out / "config.json", model.hf_config)


def _sizes_from_tensors(tensors: Weights, kind: ReleasedKind, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the fields of config.json about sizes, as the tensors have them; for archives without args and --config_file."""
    word, up = tensors["embedding.word.weight"], tensors["layers.0.mlp.up.weight"]
    hidden, default = word.shape[1], kind.defaults  # word [vocab, hidden], up [ffn, hidden]
    if hidden not in HEADS_BY_HIDDEN_SIZE:
        raise CheckpointError(
            f"the archive does not contain the number of attention heads for the hidden size {hidden}; give --config_file, a "
            f"config.json with its sizes: {', '.join(kind.size_fields.values())}"
        )
    sizes = {
        # BERT's bias of the masked words has the unpadded size. GPT-2 has no unpadded tensor, so its true size is assumed.
        "vocab_size": tensors["masked_words.bias"].shape[0] if kind is BERT_KIND else min(word.shape[0], default["vocab_size"]),
        "max_position_embeddings": tensors["embedding.position.weight"].shape[0],
        "hidden_size": hidden,
        "num_layers": _count_layers(tensors),
        "num_attention_heads": HEADS_BY_HIDDEN_SIZE[hidden],
        "ffn_hidden_size": up.shape[0],
    }
    named = {kind.size_fields[native]: value for native, value in sizes.items()}
    if unusual := {name: value for name, value in named.items() if value != default[name] and name != "vocab_size"}:
        say("taken from the tensors, since the archive has no args: " + ", ".join(f"{n} {v}" for n, v in unusual.items()))
    return named


def _count_layers(tensors: Weights) -> int:
    return 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))


def _fields_from_args(
    args: Mapping[str, Any], tensors: Weights, kind: ReleasedKind, config_file: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the fields that the scripts of Transformers 4 took from args: all sizes, with the padded vocabulary.

    They took GPT-2's activation as well, and BERT's tokenizer type.
    """
    model = config_from_args(args, tensors, args.get("padded_vocab_size") or tensors["embedding.word.weight"].shape[0])
    fields: dict[str, Any] = {field: getattr(model, native) for native, field in kind.size_fields.items()}
    if kind is GPT2_KIND:
        name = "gelu_fast" if args.get("bias_gelu_fusion") else "gelu_new" if args.get("openai_gelu") else "gelu"
        # In the script of Transformers 4 --config_file overrides the activation.
        fields |= {} if config_file is not None else {"activation_function": name}
    elif isinstance(args.get("tokenizer_type"), str):
        fields["tokenizer_type"] = args["tokenizer_type"]
    return fields


def _model_config(hf_config: Mapping[str, Any], args: Mapping[str, Any], tensors: Weights, kind: ReleasedKind) -> ModelConfig:
    """Return the resolved configuration. CheckpointError for invalid sizes, and if the family cannot express the model."""
    sizes = {native: hf_config.get(field) for native, field in kind.size_fields.items()}
    for native, value in sizes.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{kind.size_fields[native]} is {value!r}; it must be a number of at least 1")
    if sizes["hidden_size"] % sizes["num_attention_heads"]:  # type: ignore[operator]
        raise CheckpointError(f"{sizes['num_attention_heads']} attention heads do not divide the width {sizes['hidden_size']}")
    if args:
        vocab = sizes["vocab_size"]
        model = config_from_args(args, tensors, vocab)  # type: ignore[arg-type]
    else:
        settings = ModelSettings(
            **sizes,  # type: ignore[arg-type]
            architecture="gpt" if kind is GPT2_KIND else "bert",
            bert_binary_head=kind is GPT2_KIND or "order.weight" in tensors,
            untie_embeddings_and_output_weights="head.weight" in tensors,
        )
        model = resolve_model(settings)
    if unsupported := kind.family.unsupported(model):
        raise CheckpointError(f"{_choose_class(kind, tensors).architecture} cannot express it: {'; '.join(unsupported)}")
    return model


def _choose_class(kind: ReleasedKind, weights: Mapping[str, Tensor]) -> HFClass:
    """Return the class of transformers with the same heads as these weights."""
    if kind is BERT_KIND:
        return WITH_ORDER if "order.weight" in weights else WORDS_ALONE
    return kind.family.classes[0]


def _check_sizes(config: ModelConfig, tensors: Weights, kind: ReleasedKind) -> None:
    """Raise CheckpointError if the sizes in the configuration are not those of the tensors."""
    word, position, up = (tensors[f"{name}.weight"] for name in ("embedding.word", "embedding.position", "layers.0.mlp.up"))
    actual = {
        "max_position_embeddings": position.shape[0],
        "hidden_size": word.shape[1],
        "num_layers": _count_layers(tensors),
        "ffn_hidden_size": up.shape[0],
    }
    wrong = [
        (kind.size_fields[name], getattr(config, name), size) for name, size in actual.items() if getattr(config, name) != size
    ]
    if config.known_vocab_size > word.shape[0]:
        wrong.append((kind.size_fields["vocab_size"], config.vocab_size, word.shape[0]))
    if wrong:
        listed = ", ".join(f"{name} {expected} but {size} in the tensors" for name, expected, size in wrong)
        raise CheckpointError(f"the settings are not those of the tensors: {listed}. Give the right --config_file")


def _note_other_settings(
    args: Mapping[str, Any], config: ModelConfig, hf_config: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    """Report settings in which config.json differs from the args, since the scripts of Transformers 4 took few from them."""
    fields = family_named(hf_config["model_type"]).fields
    shared = [
        (name, field.native)
        for name, field in fields.items()
        if field.native in NUMBER_ARGS and args.get(field.native) is not None
    ]
    pairs = [(name, hf_config[name], getattr(config, native)) for name, native in shared if name in hf_config]
    different = [f"{name} {written} ({in_args})" for name, written, in_args in pairs if written != in_args]
    activation = "hidden_act" if "hidden_act" in fields else "activation_function"
    if "bias_gelu_fusion" in args and ACTIVATIONS.get(hf_config[activation]) != config.activation:
        different.append(f"{activation} {hf_config[activation]} ({config.activation})")
    if different:
        say(
            "config.json has the values of --config_file or of Transformers 4's script, which differ from the archive's args, "
            f"in brackets: {', '.join(different)}. Use --config_file to change them"
        )


def _tensor_groups(model: ReleasedModel, kind: ReleasedKind) -> list[TensorGroup]:
    """Return every tensor of the class's table, zeros for absent biases and the like, and the copies of tied tensors."""
    weights, config, groups = model.weights, model.config, []
    for row in model.hf_class.mappings(config):
        tensor = weights.get(row.native)
        if tensor is None:
            if row.zeros_shape is None:
                continue  # the output layer of a tied model, which is written below as a copy
            tensor = torch.zeros(row.zeros_shape(config), dtype=weights["embedding.word.weight"].dtype)
        written = list(zip(row.hf, row.conversion.to_hf(tensor, config), strict=True))
        # Transformers 4 wrote tied tensors under both names.
        if not config.untie_embeddings_and_output_weights:
            written += [
                (copy, value)
                for copy, original in kind.family.tied_copies.items()
                for name, value in written
                if name == original
            ]
        groups.append(TensorGroup(tuple(_tensor_entry(name, value) for name, value in written)))
    return groups


def _tensor_entry(name: str, tensor: Tensor) -> TensorEntry:
    """Return the entry of a tensor in a safetensors file. CheckpointError for a dtype that cannot be written."""
    if tensor.dtype not in CODE_FROM_DTYPE:
        raise CheckpointError(f"{name}: {tensor.dtype} cannot be written")
    return TensorEntry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)
