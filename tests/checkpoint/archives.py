"""Models whose every weight matters, and files of Megatron-LM written from them by rules of their own."""

from __future__ import annotations

import enum
import sys
import types
import zipfile
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron.config.schema import ModelConfig
from megatron.contract import StagePart
from megatron.model.build import MODELS
from megatron.model.init import initialize
from megatron.parallel.random import derive_seed
from megatron.parallel.spec import param_spec
from megatron.parallel.tensor_parallel import TensorParallel

SMALL = dict(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=80,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=8,
    max_position_embeddings=48,
    vocab_size=127,
)
NAMES = {
    "input_norm": "input_layernorm",
    "attention.qkv": "attention.query_key_value",
    "attention.dense": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}


def build(config, half=False):
    """Build the whole model with random weights; half: rounded to fp16, computed in fp32."""
    model = MODELS[config.architecture](config, StagePart(range(config.num_layers), True, True), TensorParallel.alone())
    initialize(model, config, 7)
    with torch.no_grad():
        for parameter in model.parameters():
            spec = param_spec(parameter)
            noise = torch.randn(spec.shape, generator=torch.Generator().manual_seed(derive_seed(3, spec.name)))
            spec.local(parameter).add_(noise * 0.2)
            if half:
                parameter.copy_(parameter.half())
    return model.eval()


def named_weights(model):
    return {param_spec(p).name: param_spec(p).local(p.detach()).clone() for p in model.parameters()}


def small_config(**changes):
    return ModelConfig(**{**SMALL, **changes})


def reorder_qkv(rows, heads, version):
    """Put rows of queries, keys and values in the order of an older version.

    Args:
        rows: `[heads * 3 * width, ...]`, each head with its queries, keys and values.
        heads: number of heads.
        version: of the checkpoint; 0 and 1.0 have orders of their own.
    """
    parts = rows.view(heads, 3, -1, *rows.shape[1:])
    if version == 0:
        parts = parts.transpose(0, 1)
    elif version == 1.0:
        parts = parts.transpose(1, 2)
    return parts.reshape(rows.shape)


def released_state(config, weights, version, padded, half=True):
    """Build the `model` of one file as the released archives have it, with older names.

    Args:
        config: of the model.
        weights: by our names.
        version: of the checkpoint, which orders queries, keys and values.
        padded: rows of the vocabulary.
        half: in fp16.
    """

    def grown(t):
        return torch.cat([t, torch.full((padded - len(t), *t.shape[1:]), 0.5)])

    layers = {}
    for n in range(config.num_layers):
        for ours, theirs in NAMES.items():
            for kind in ("weight", "bias"):
                tensor = weights[f"layers.{n}.{ours}.{kind}"]
                layers[f"layers.{n}.{theirs}.{kind}"] = (
                    reorder_qkv(tensor, config.num_attention_heads, version) if "qkv" in ours else tensor
                )
    for kind in ("weight", "bias"):
        layers[f"final_layernorm.{kind}"] = weights[f"final_norm.{kind}"]
    embedding = {
        "word_embeddings": {"weight": grown(weights["embedding.word.weight"])},
        "position_embeddings": {"weight": weights["embedding.position.weight"]},
    }
    model = {"language_model": {"embedding": embedding, "transformer": layers}}
    if config.architecture == "bert":
        embedding["tokentype_embeddings"] = {"weight": weights["embedding.segment.weight"]}
        model["language_model"]["pooler"] = {f"dense.{k}": weights[f"pooler.{k}"] for k in ("weight", "bias")}
        model["binary_head"] = {k: weights[f"order.{k}"] for k in ("weight", "bias")}
        model["lm_head"] = {
            "bias": grown(weights["masked_words.bias"]),
            **{f"dense.{k}": weights[f"masked_words.dense.{k}"] for k in ("weight", "bias")},
            **{f"layernorm.{k}": weights[f"masked_words.norm.{k}"] for k in ("weight", "bias")},
        }
    return to_half(model) if half else model


def to_half(value):
    return {k: to_half(v) for k, v in value.items()} if isinstance(value, dict) else value.half()


@contextmanager
def foreign_class():
    """Make a class of a `megatron` that nobody here has; gone when the file is read."""
    module = types.ModuleType("megatron_lm_of_old")
    kind = enum.Enum("ModelType", {"encoder_or_decoder": 1}, module="megatron_lm_of_old")
    module.ModelType = kind
    sys.modules["megatron_lm_of_old"] = module
    try:
        yield kind
    finally:
        del sys.modules["megatron_lm_of_old"]


def write_archive(path, model, version, args=None, **more):
    """Write a zip with the file in its place, or the file itself where `path` ends in .pt.

    Args:
        path: of the archive.
        model: its `model`; None for a file without one.
        version: its `checkpoint_version`; None for a file without one.
        args: its arguments, whose class is not here.
        more: further keys of the file.
    """
    file = {"iteration": 5, **more} if model is None else {"model": model, "iteration": 5, **more}
    if version is not None:
        file["checkpoint_version"] = version
    target = path if path.suffix == ".pt" else path.with_suffix(".tmp")
    with foreign_class() as kind:
        if args is not None:
            file["args"] = Namespace(**args, model_type=kind.encoder_or_decoder, params_dtype=torch.float16)
        torch.save(file, target)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(target, "release/mp_rank_00/model_optim_rng.pt")
        target.unlink()
    return path


def read_files(root: Path) -> dict[str, bytes]:
    """Read all files of a directory, by their relative paths."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
