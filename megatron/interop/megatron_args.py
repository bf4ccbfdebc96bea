"""Convert the settings in Megatron-LM's checkpoints, an argparse namespace, to our configuration, and back.

Most names are the same, since our flags are Megatron-LM's. Two things differ: in Megatron-LM several switches select the
activation, and the vocabulary size is the padded one. Files of every release are read, so any name may be absent; it then gets
the value that a release without this setting used. Settings that the model here does not have are refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from megatron.checkpoint.layout import CheckpointError
from megatron.config.resolve import resolve_model
from megatron.config.schema import ModelConfig, ModelSettings
from megatron.parallel.embedding import padded_vocab_size

MEGATRON_NORMS = ("LayerNorm", "RMSNorm")
# Arguments of the same name and the same meaning on both sides.
SIZE_ARGS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "max_position_embeddings")
SWITCH_ARGS = (
    "apply_layernorm_1p",
    "add_bias_linear",
    "untie_embeddings_and_output_weights",
    "apply_residual_connection_post_layernorm",
    "init_method_xavier_uniform",
    "rotary_interleaved",
)
NUMBER_ARGS = ("layernorm_epsilon", "rotary_base", "rotary_percent", "attention_dropout", "hidden_dropout", "init_method_std")
LEARNED_POSITIONS = "embedding.position.weight"

# Settings that the model here does not have: their name, a test for values without any effect, and a description for messages.
HasNoEffect = Callable[[Any], bool]
UNSUPPORTED: Mapping[str, tuple[HasNoEffect, str]] = MappingProxyType(
    {
        "num_experts": (lambda v: v in (None, [], [None], 1, [1], 0), "a mixture of experts (--num-experts)"),
        "retro_add_retriever": (lambda v: not v, "Retro's retriever (--retro-add-retriever)"),
        "rotary_seq_len_interpolation_factor": (
            lambda v: v in (None, 1),
            "rotary positions that are stretched (--rotary-seq-len-interpolation-factor)",
        ),
        "use_rope_scaling": (lambda v: not v, "rotary positions that are scaled (--use-rope-scaling)"),
        "qk_layernorm": (lambda v: not v, "norms of queries and keys (--qk-layernorm)"),
        "add_qkv_bias": (lambda v: not v, "a bias of queries, keys and values alone (--add-qkv-bias)"),
        "multi_latent_attention": (lambda v: not v, "latent attention (--multi-latent-attention)"),
        "pipeline_model_parallel_split_rank": (lambda v: v is None, "an encoder and a decoder"),
        "window_size": (lambda v: v is None, "attention in a window (--window-size)"),
    }
)


def config_from_args(args: Mapping[str, Any], weights: Mapping[str, Tensor], vocab_size: int) -> ModelConfig:
    """Return the resolved configuration of a model of Megatron-LM.

    Args:
        args: the file's settings under Megatron-LM's names.
        weights: the whole tensors under our global names; some settings are inferred from them.
        vocab_size: the vocabulary size without padding.

    Raises:
        CheckpointError: a size is missing, or a setting is one that the model here does not have.
    """
    positions = _position_embedding(args, weights)
    _refuse_unsupported(args, weights)
    if missing := _missing_tensors(args, weights, positions=positions != "none"):
        raise CheckpointError(f"there is no {'; no '.join(missing)}")
    bert = "masked_words.dense.weight" in weights
    model = ModelSettings(
        **_setting_values(args, vocab_size),
        architecture="bert" if bert else "gpt",
        # A BERT has both or neither of the binary head and the token types, so either tensor proves both.
        bert_binary_head="order.weight" in weights or "embedding.segment.weight" in weights or not bert,
        activation=activation_from_args(args),
        normalization=args.get("normalization", "LayerNorm"),
        position_embedding_type=positions,
        # RMSNorm has no bias, but the setting keeps its default, True.
        add_norm_bias="final_norm.bias" in weights or args.get("normalization") == "RMSNorm",
        make_vocab_size_divisible_by=args.get("make_vocab_size_divisible_by") or 128,
    )
    model = _with_length(model, args, weights)
    try:
        return resolve_model(model)
    except ValueError as error:
        raise CheckpointError(f"its settings describe no model: {error}") from error


def _position_embedding(args: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Return our name of the kind of positions. Learned positions are recognized by their tensor."""
    if _has_rotary_positions(args):
        return "rope"
    return "learned_absolute" if LEARNED_POSITIONS in weights else "none"


def _refuse_unsupported(args: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError with the list of all settings of the file that the model here does not have."""
    unsupported = [text for name, (no_effect, text) in UNSUPPORTED.items() if name in args and not no_effect(args[name])]
    if _has_rotary_positions(args) and LEARNED_POSITIONS in weights:
        unsupported.append("rotary and learned positions at once (train it with --no-position-embedding)")
    if args.get("position_embedding_type", "learned_absolute") not in ("learned_absolute", "rope", "none"):
        unsupported.append(f"--position-embedding-type {args['position_embedding_type']}")
    if args.get("normalization", "LayerNorm") not in MEGATRON_NORMS:
        unsupported.append(f"--normalization {args['normalization']}")
    if unsupported:
        raise CheckpointError(f"the saved model has {'; '.join(unsupported)}, which the model here does not have")


def _setting_values(args: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return the settings that have the same meaning on both sides. CheckpointError for a wrong type or a missing size."""
    if (epsilon := args.get("norm_epsilon")) is not None:  # its name since September 2023
        if (older := args.get("layernorm_epsilon")) not in (None, epsilon):
            raise CheckpointError(
                f"the file's args say norm_epsilon {epsilon} and layernorm_epsilon {older}, two names of one setting"
            )
        args = {**args, "layernorm_epsilon": epsilon}
    values = {name: args[name] for name in (*SIZE_ARGS, *SWITCH_ARGS, *NUMBER_ARGS) if args.get(name) is not None}
    if missing := [name for name in ("num_layers", "hidden_size", "num_attention_heads") if name not in values]:
        raise CheckpointError(f"the file's args do not say {', '.join(missing)}")
    values["vocab_size"] = vocab_size
    for name, value in values.items():
        _check_type(name, value)
    if "rotary_base" in values:
        values["rotary_base"] = float(values["rotary_base"])
    if args.get("group_query_attention") and args.get("num_query_groups") is not None:
        values["num_query_groups"] = args["num_query_groups"]
    return values


def _check_type(name: str, value: object) -> None:
    """Raise CheckpointError for a switch that is not a bool, and for a number of another type."""
    if name in SWITCH_ARGS:
        if not isinstance(value, bool):
            raise CheckpointError(f"the file's args say {name} = {value!r}, which is not a switch")
        return
    number_type = int if name in (*SIZE_ARGS, "vocab_size") else int | float
    if not isinstance(value, number_type) or isinstance(value, bool):  # a bool is an int to Python
        raise CheckpointError(f"the file's args say {name} = {value!r}, which is not a number")


def _with_length(model: ModelSettings, args: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ModelSettings:
    """Return `model` with max_position_embeddings: from the args, else from the tensor, else the sequence length."""
    if model.max_position_embeddings is not None:
        return model
    if model.position_embedding_type == "learned_absolute":
        return replace(model, max_position_embeddings=weights[LEARNED_POSITIONS].shape[0])
    if args.get("seq_length") is None:
        raise CheckpointError("the file's args do not say max_position_embeddings")
    return replace(model, max_position_embeddings=args["seq_length"])


def _missing_tensors(args: Mapping[str, Any], weights: Mapping[str, Tensor], *, positions: bool) -> list[str]:
    """Return as texts the missing tensors that every model of Megatron-LM with these args has.

    Without this check a damaged file would be read as a valid model without positions or without biases of its norms.

    positions: whether the model has positions, rotary or learned.
    """
    missing = []
    if not positions and args.get("add_position_embedding", True) and args.get("position_embedding_type") != "none":
        missing.append(
            "position embedding, but the file's args ask for learned positions (they are without --no-position-embedding)"
        )
    has_norm_bias = args.get("normalization", "LayerNorm") == "LayerNorm"
    if has_norm_bias and "final_norm.weight" in weights and "final_norm.bias" not in weights:
        missing.append("bias of the last LayerNorm, which always has one in Megatron-LM; for RMSNorm the args must say so")
    return missing


def _has_rotary_positions(args: Mapping[str, Any]) -> bool:
    # use_rotary_position_embeddings is the older of the two flags.
    return bool(args.get("use_rotary_position_embeddings")) or args.get("position_embedding_type") == "rope"


def activation_from_args(args: Mapping[str, Any]) -> str:
    """Return our name of the activation. Only the fused kernel and --openai-gelu compute GELU by tanh."""
    if args.get("swiglu"):
        return "swiglu"
    if args.get("squared_relu"):
        return "squared-relu"
    fused = args.get("bias_gelu_fusion") and args.get("add_bias_linear", True)
    return "gelu" if args.get("openai_gelu") or (fused and not args.get("onnx_safe")) else "gelu-exact"


def args_from_config(config: ModelConfig, tp: int, pp: int, tokenizer_type: str | None, dtype: str) -> argparse.Namespace:
    """Return the `args` of a checkpoint of Megatron-LM, under its names.

    Megatron-LM has no `true_vocab_size`; it is written so that a later import restores the unpadded vocabulary.

    Args:
        config: the resolved configuration.
        tp: the tensor-parallel size.
        pp: the pipeline-parallel size.
        tokenizer_type: Megatron-LM's name of the tokenizer's type, None without a tokenizer.
        dtype: the dtype of the weights: `float32`, `float16` or `bfloat16`.
    """
    heads, groups = config.num_attention_heads, config.num_query_groups
    vocab, rope = config.known_vocab_size, config.position_embedding_type == "rope"
    tanh = config.activation == "gelu"
    values: dict[str, Any] = {name: getattr(config, name) for name in (*SIZE_ARGS, *SWITCH_ARGS, *NUMBER_ARGS)}
    values |= {
        "encoder_num_layers": config.num_layers,
        "seq_length": config.max_position_embeddings,
        "encoder_seq_length": config.max_position_embeddings,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "normalization": config.normalization,
        "position_embedding_type": config.position_embedding_type,
        "use_rotary_position_embeddings": rope,
        "add_position_embedding": config.position_embedding_type == "learned_absolute",
        "rotary_base": config.rotary_base,
        "swiglu": config.activation == "swiglu",
        "squared_relu": config.activation == "squared-relu",
        # The fused kernel adds the bias too, so without biases --openai-gelu stands for GELU by tanh.
        "bias_gelu_fusion": tanh and config.add_bias_linear,
        "openai_gelu": tanh and not config.add_bias_linear,
        "onnx_safe": None,
        "bert_binary_head": config.bert_binary_head,
        "make_vocab_size_divisible_by": config.make_vocab_size_divisible_by,
        "padded_vocab_size": padded_vocab_size(vocab, tp, config.make_vocab_size_divisible_by),
        "true_vocab_size": vocab,
        "tokenizer_type": tokenizer_type,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": None,
        "fp16": dtype == "float16",
        "bf16": dtype == "bfloat16",
    }
    return argparse.Namespace(**dict(sorted(values.items())))


def unsupported_by_megatron(config: ModelConfig, tp: int, pp: int) -> list[str]:
    """Return as texts the reasons why Megatron-LM cannot load a model on tp x pp ranks; empty if it can.

    Args:
        config: the resolved configuration.
        tp: the tensor-parallel size.
        pp: the pipeline-parallel size.
    """
    obstacles = []
    if tp < 1 or pp < 1:
        return [f"{tp} x {pp} ranks: both must be at least 1"]
    for unit, number in (
        ("attention heads", config.num_attention_heads),
        ("key-value heads", config.num_query_groups),
        ("features of the MLP", config.ffn_hidden_size),
    ):
        if number % tp:
            obstacles.append(f"{number} {unit} cannot be divided over {tp} tensor-parallel ranks")
    if config.num_layers % pp:
        obstacles.append(f"{config.num_layers} layers cannot be divided into {pp} equal stages")
    if config.normalization not in MEGATRON_NORMS:
        obstacles.append(f"it has {' and '.join(MEGATRON_NORMS)} (--normalization {config.normalization})")
    if config.normalization == "LayerNorm" and not config.add_norm_bias:
        obstacles.append("its LayerNorm always has a bias (--disable-norm-bias)")
    return obstacles


def even_stages(layers: int, pp: int) -> Sequence[range]:
    """Return the layers of each of `pp` pipeline stages of equal size; pp must divide `layers`."""
    per_stage = layers // pp
    return [range(stage * per_stage, (stage + 1) * per_stage) for stage in range(pp)]
