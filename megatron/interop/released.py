"""The archives that NVIDIA released, GPT-2 345M and BERT 345M, as Hugging Face directories.

An archive is a zip with `release/mp_rank_00/model_optim_rng.pt` in it: one file of Megatron-LM, of any checkpoint_version, most
without the settings it was trained with. So a model's sizes come, first to last, from its args, from `--config_file`, and from
the tensors where these leave no doubt; and whatever they come from, the tensors must agree.
What is written beside the archive, `config.json` and `model.safetensors`, is what the conversion scripts of Transformers 4
made: their defaults, and tensors of the type that they have in the archive.
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
from megatron.checkpoint.storage import DTYPES, Entry, Storage
from megatron.config.resolve import resolve_model
from megatron.config.schema import ModelConfig, ModelSettings
from megatron.files.regular import check_regular, error_reason, read_json
from megatron.interop.families.family import HFClass
from megatron.interop.families.megatron_bert import WITH_ORDER, WORDS_ALONE
from megatron.interop.families.shared import ACTIVATIONS
from megatron.interop.families.table import family_named
from megatron.interop.foreign_numbers import check_config
from megatron.interop.hf_export import SHARD_BYTES, Group, write_files, write_json
from megatron.interop.megatron_args import NUMBERS, settings
from megatron.interop.megatron_files import arguments_of, copies_agree, version_of
from megatron.interop.megatron_lm import Sizes, Weights, chunks_of, join, unpadded
from megatron.interop.pickled import read_pickled
from megatron.interop.released_kinds import BERT_KIND, GPT2_KIND, Kind
from megatron.interop.soundness import zero_matrices

MEMBER = "release/mp_rank_00/model_optim_rng.pt"
NEEDED = ("num_layers", "hidden_size", "num_attention_heads")  # of args
MATRICES = ("embedding.word.weight", "embedding.position.weight", "layers.0.mlp.up.weight")
MAX_RATIO = 20  # of the unpacked size to the packed one; zip packs weights to more than half
MAX_FREE_BYTES = 1 << 26  # that may be unpacked from any size
HEADS = MappingProxyType({1024: 16})  # by width, where a model's heads are known without being told: the released sizes


def read_archive(path: Path) -> dict[str, Any]:
    """The dictionary in a zip with MEMBER, or in the file itself. CheckpointError when there is none that is harmless."""
    if path.is_dir():
        raise CheckpointError(f"{path}: this is a directory; give the archive or its .pt file, or use tools/import_megatron.py")
    try:
        check_regular(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: {error.strerror if path.is_symlink() else 'there is no such file'}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                member = _unpacked(archive) if MEMBER in names else None
        except (zipfile.BadZipFile, EOFError, RuntimeError, OSError, ValueError, zlib.error) as error:
            raise CheckpointError(f"{path}: {MEMBER} in it is damaged: {error}") from error
        if member is not None:
            return read_pickled(member, f"{path}: {MEMBER}")
    if path.suffix.lower() == ".zip":
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path}: not a whole zip archive; was the download cut short?")
        held = ", ".join(names[:5]) or "nothing"
        raise CheckpointError(f"{path}: there is no {MEMBER} in it; it holds {held}")
    return read_pickled(path, str(path))


def _unpacked(archive: zipfile.ZipFile) -> bytes:
    """The bytes of MEMBER. CheckpointError for more than weights of its packed size can be, before anything is unpacked.

    The size that the archive claims is checked, and no more is ever unpacked: what is longer is damaged.
    """
    about = archive.getinfo(MEMBER)
    if about.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(
            f"{archive.filename}: {MEMBER} is packed by method {about.compress_type}; unpack it, give the .pt"
        )
    if about.file_size > MAX_RATIO * about.compress_size + MAX_FREE_BYTES:
        raise CheckpointError(
            f"{archive.filename}: {MEMBER} would unpack from {about.compress_size:,} bytes to {about.file_size:,}, more than "
            f"{MAX_RATIO} times as many; weights pack to more than half, so this is made to fill the memory"
        )
    return archive.read(about)


def read_config_file(path: Path) -> dict[str, Any]:
    """The JSON object of --config_file. CheckpointError when it is none."""
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable config.json: {error_reason(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    check_config(values, str(path))
    return values


@dataclass(frozen=True)
class Found:
    """Content of an archive.

    about: of config.json. model: resolved. weights: whole, under our names. written_as: its class.
    """

    about: dict[str, Any]
    model: ModelConfig
    weights: Weights
    written_as: HFClass


def understand(
    file: Mapping[str, Any], kind: Kind, given: Mapping[str, Any] | None, say: Callable[[str], None] = print
) -> Found:
    """The model in one archive's dictionary.

    given: of --config_file, None without it. say: is told what was assumed. CheckpointError when sizes do not agree.
    """
    args, version = arguments_of(file), version_of(file, "the checkpoint")
    chunks = _whole_model(file, args)
    if any(args.get(name) is None for name in NEEDED):
        args = {}  # of the oldest archives, where they say nothing about the model
    # Ordering queries, keys and values anew needs the heads, and names alone do not.
    known = join([chunks], Sizes(1, 1, 1), 2.0)
    _check_kind(known, kind)
    about = _described(args, known, kind, given, say)
    model = _model(about, args, known, kind)
    _agree(model, known, kind)
    if args:
        _tell_of_other_settings(args, model, about, say)
    sizes = Sizes(model.num_attention_heads, 1, model.kv_channels)
    weights = unpadded(join([chunks], sizes, version), model.known_vocab_size)
    for name in zero_matrices(weights):
        say(f"{name} is all zeros; was the model saved whole?")
    written_as = _class_of(kind, weights)
    about["architectures"] = [written_as.architecture]
    if model.untie_embeddings_and_output_weights:
        about["tie_word_embeddings"] = False
    return Found(about, model, weights, written_as)


def _whole_model(file: Mapping[str, Any], args: Mapping[str, Any]) -> list[Any]:
    """The file's only chunk of layers, in a list. CheckpointError for one of several ranks' files."""
    chunks = chunks_of(file, "the checkpoint")
    ranks = [args.get(f"{axis}_model_parallel_size") or 1 for axis in ("tensor", "pipeline")]
    if len(chunks) > 1 or ranks != [1, 1]:
        raise CheckpointError("it is one rank's share of a model; use tools/import_megatron.py on the whole directory")
    copies_agree([chunks])
    return chunks


def _check_kind(known: Weights, kind: Kind) -> None:
    """CheckpointError for a model of the other kind, and for tensors that are no whole model."""
    if ("masked_words.dense.weight" in known) != (kind is BERT_KIND):
        other = GPT2_KIND if kind is BERT_KIND else BERT_KIND
        raise CheckpointError(f"it is no {kind.name}; use {other.tool}")
    if any(name not in known or known[name].dim() != 2 for name in MATRICES):
        raise CheckpointError(f"it holds no whole {kind.name}: there are no word or position embeddings, or no layers")


def _described(
    args: Mapping[str, Any], known: Weights, kind: Kind, given: Mapping[str, Any] | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """The fields of config.json: the kind's defaults, over them --config_file or the tensors' sizes, over them the args."""
    if given is not None:
        about = {**kind.defaults, **kind.usual_sizes, **given}
    else:
        about = {**kind.defaults, **({} if args else _sizes_there(known, kind, say))}
    about |= {"architectures": kind.defaults["architectures"], "model_type": kind.defaults["model_type"]}
    if args:
        about |= _from_args(args, known, kind, given)
    if about.get(kind.sizes["ffn_hidden_size"]) is None and type(width := about[kind.sizes["hidden_size"]]) is int:
        about[kind.sizes["ffn_hidden_size"]] = 4 * width
    return about


def write(found: Found, kind: Kind, out: Path) -> None:
    """config.json and the weights, into `out`. The weights are exactly those of the model."""
    write_files(Storage(), out, _groups(found, kind), SHARD_BYTES)
    write_json(Storage(), out / "config.json", found.about)


def _sizes_there(known: Weights, kind: Kind, say: Callable[[str], None]) -> dict[str, Any]:
    """The sizes that the tensors have, for an archive without args and a call without --config_file."""
    word, up = known["embedding.word.weight"], known["layers.0.mlp.up.weight"]
    hidden, default = word.shape[1], kind.defaults
    if hidden not in HEADS:
        raise CheckpointError(
            f"the archive does not say how many attention heads a model of width {hidden} has; give --config_file, a "
            f"config.json with its sizes: {', '.join(kind.sizes.values())}"
        )
    found = {
        "vocab_size": known["masked_words.bias"].shape[0] if kind is BERT_KIND else min(word.shape[0], default["vocab_size"]),
        "max_position_embeddings": known["embedding.position.weight"].shape[0],
        "hidden_size": hidden,
        "num_layers": _layers(known),
        "num_attention_heads": HEADS[hidden],
        "ffn_hidden_size": up.shape[0],
    }
    named = {kind.sizes[ours]: value for ours, value in found.items()}
    if other := {name: value for name, value in named.items() if value != default[name] and name != "vocab_size"}:
        say("taken from the tensors, since the archive has no args: " + ", ".join(f"{n} {v}" for n, v in other.items()))
    return named


def _layers(known: Weights) -> int:
    return 1 + max(int(name.split(".")[1]) for name in known if name.startswith("layers."))


def _from_args(args: Mapping[str, Any], known: Weights, kind: Kind, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the old scripts took from a file's args: all sizes, the vocabulary with its padding; of GPT-2 the activation."""
    model = settings(args, known, args.get("padded_vocab_size") or known["embedding.word.weight"].shape[0])
    found: dict[str, Any] = {theirs: getattr(model, ours) for ours, theirs in kind.sizes.items()}
    if kind is GPT2_KIND:
        name = "gelu_fast" if args.get("bias_gelu_fusion") else "gelu_new" if args.get("openai_gelu") else "gelu"
        # The old script let --config_file decide here.
        found |= {} if given is not None else {"activation_function": name}
    elif isinstance(args.get("tokenizer_type"), str):
        found["tokenizer_type"] = args["tokenizer_type"]
    return found


def _model(about: Mapping[str, Any], args: Mapping[str, Any], known: Weights, kind: Kind) -> ModelConfig:
    """What the tables of names must know. CheckpointError for a model that the family cannot express."""
    sizes = {ours: about.get(theirs) for ours, theirs in kind.sizes.items()}
    for ours, value in sizes.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{kind.sizes[ours]} is {value!r}; it must be a number of at least 1")
    if sizes["hidden_size"] % sizes["num_attention_heads"]:  # type: ignore[operator]
        raise CheckpointError(f"{sizes['num_attention_heads']} attention heads do not divide the width {sizes['hidden_size']}")
    if args:
        vocab = sizes["vocab_size"]
        model = settings(args, known, vocab)  # type: ignore[arg-type]
    else:
        given = ModelSettings(
            **sizes,  # type: ignore[arg-type]
            architecture="gpt" if kind is GPT2_KIND else "bert",
            bert_binary_head=kind is GPT2_KIND or "order.weight" in known,
            untie_embeddings_and_output_weights="head.weight" in known,
        )
        model = resolve_model(given)
    if unsupported := kind.family.unsupported(model):
        raise CheckpointError(f"{_class_of(kind, known).architecture} cannot express it: {'; '.join(unsupported)}")
    return model


def _class_of(kind: Kind, weights: Mapping[str, Tensor]) -> HFClass:
    if kind is BERT_KIND:
        return WITH_ORDER if "order.weight" in weights else WORDS_ALONE
    return kind.family.classes[0]


def _agree(model: ModelConfig, known: Weights, kind: Kind) -> None:
    """CheckpointError when the settings are not those of the tensors."""
    word, position, up = (known[f"{name}.weight"] for name in ("embedding.word", "embedding.position", "layers.0.mlp.up"))
    held = {
        "max_position_embeddings": position.shape[0],
        "hidden_size": word.shape[1],
        "num_layers": _layers(known),
        "ffn_hidden_size": up.shape[0],
    }
    wrong = [(kind.sizes[name], getattr(model, name), there) for name, there in held.items() if getattr(model, name) != there]
    if model.known_vocab_size > word.shape[0]:
        wrong.append((kind.sizes["vocab_size"], model.vocab_size, word.shape[0]))
    if wrong:
        listed = ", ".join(f"{name} {asked} but {there} in the tensors" for name, asked, there in wrong)
        raise CheckpointError(f"the settings are not those of the tensors: {listed}. Give the right --config_file")


def _tell_of_other_settings(
    args: Mapping[str, Any], model: ModelConfig, about: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    """A line where config.json says something else than the args: the old scripts took sizes alone from these."""
    fields = family_named(about["model_type"]).fields
    both = [(name, field.ours) for name, field in fields.items() if field.ours in NUMBERS and args.get(field.ours) is not None]
    pairs = [(name, about[name], getattr(model, ours)) for name, ours in both if name in about]
    other = [f"{name} {said} ({there})" for name, said, there in pairs if said != there]
    activation = "hidden_act" if "hidden_act" in fields else "activation_function"
    if "bias_gelu_fusion" in args and ACTIVATIONS.get(about[activation]) != model.activation:
        other.append(f"{activation} {about[activation]} ({model.activation})")
    if other:
        say(
            "config.json says what Transformers 4's script or --config_file says, and the archive's args, in brackets, say "
            f"something else: {', '.join(other)}. --config_file decides"
        )


def _groups(found: Found, kind: Kind) -> list[Group]:
    """Every tensor of the class's table, zeros where the model has none, and the copies."""
    weights, model, groups = found.weights, found.model, []
    for row in found.written_as.table(model):
        tensor = weights.get(row.ours)
        if tensor is None:
            if row.zeros is None:
                continue  # the output layer of a tied model: a copy stands in for it
            tensor = torch.zeros(row.zeros(model), dtype=weights["embedding.word.weight"].dtype)
        made = list(zip(row.theirs, row.form.write(tensor, model), strict=True))
        if not model.untie_embeddings_and_output_weights:
            made += [(copy, value) for copy, original in kind.family.copies.items() for name, value in made if name == original]
        groups.append(Group(tuple(_entry(name, value) for name, value in made)))
    return groups


def _entry(name: str, tensor: Tensor) -> Entry:
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{name}: {tensor.dtype} cannot be written")
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)
