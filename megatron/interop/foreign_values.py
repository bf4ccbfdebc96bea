"""Check the values of untrusted configurations before anything is computed from them.

Unchecked, a width of 10**30 would overflow, 10**12 layers would be built in an endless loop, and a NaN would spread to every
logit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from megatron.checkpoint.layout import CheckpointError

MAX_COUNT = 1 << 16  # of layers and heads, over which there are loops
MAX_SIZE = 1 << 31  # of widths: the product of two still fits into 64 bits
MAX_INTEGER = 1 << 63  # of any other field
MAX_TEXT = 10_000  # characters
# Numbers of layers and heads, and widths, by the names of Hugging Face and of Megatron-LM.
COUNT_FIELDS = frozenset(
    {
        *("n_layer", "n_head", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("num_layers", "encoder_num_layers", "num_query_groups"),
    }
)
SIZE_FIELDS = frozenset(
    {
        *("vocab_size", "n_positions", "max_position_embeddings", "n_embd", "hidden_size", "n_inner", "intermediate_size"),
        *("head_dim", "type_vocab_size", "padded_vocab_size", "true_vocab_size", "seq_length", "ffn_hidden_size"),
        *("kv_channels", "make_vocab_size_divisible_by"),
    }
)
SWITCH_FIELDS = frozenset(
    {
        *("tie_word_embeddings", "attention_bias", "mlp_bias", "scale_attn_weights", "is_decoder", "add_cross_attention"),
        "scale_attn_by_inverse_layer_idx",
    }
)


def check_hf_config(hf_config: Mapping[str, Any], path: str) -> None:
    """Raise CheckpointError for a value in a config.json that is invalid for every model.

    Args:
        hf_config: the content of config.json.
        path: the path of the file, for the message.
    """
    suffix = f" of {PurePath(path).name}"
    _check_sizes(hf_config, path, suffix)
    for name, value in hf_config.items():
        table = value if isinstance(value, dict) else {name: value}
        for key, item in table.items():
            field = f"`{name}`{suffix}" if table is not value else f"`{key}` of `{name}`{suffix}"
            if isinstance(item, float) and not math.isfinite(item):
                raise CheckpointError(f"{path}: {field} is {item}; it must be finite")
            if isinstance(item, int) and abs(item) >= MAX_INTEGER:
                raise CheckpointError(f"{path}: {field} is {shorten_value(item)}, which makes no sense")
            if isinstance(item, str) and len(item) > MAX_TEXT:
                raise CheckpointError(f"{path}: {field} is a text of {len(item):,} characters, which makes no sense")
        if name in SWITCH_FIELDS and value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{path}: `{name}`{suffix} is {shorten_value(value)}; it must be true or false")
        if name == "architectures" and value is not None and not _is_list_of_names(value):
            raise CheckpointError(f"{path}: `{name}`{suffix} is {shorten_value(value)}; it must be a list of names")


def check_megatron_args(args: Mapping[str, Any], prefix: str) -> None:
    """Raise CheckpointError for a size in a file's args that is too large for any model. prefix: begins the message."""
    for name, value in args.items():
        maximum = MAX_COUNT if name in COUNT_FIELDS else MAX_SIZE
        if name not in COUNT_FIELDS | SIZE_FIELDS or not isinstance(value, int | float):
            continue
        if not value <= maximum:  # also true of NaN
            raise CheckpointError(
                f"{prefix}: `{name}` is {shorten_value(value)}, which makes no sense: it may be at most {maximum:,}"
            )


def _check_sizes(values: Mapping[str, Any], path: str, suffix: str) -> None:
    """Raise CheckpointError for a size that is not an integer or is out of range. Absent sizes and null pass.

    path, suffix: text before and after the name of the size in the message.
    """
    for name, value in values.items():
        maximum = MAX_COUNT if name in COUNT_FIELDS else MAX_SIZE if name in SIZE_FIELDS else None
        if maximum is None or value is None:
            continue
        if type(value) is not int or not 1 <= value <= maximum:
            rule = f"it must be a whole number from 1 to {maximum:,}"
            raise CheckpointError(f"{path}: `{name}`{suffix} is {shorten_value(value)}, which makes no sense: {rule}")


def shorten_value(value: object) -> str:
    """Return a value as a text of at most 80 characters, for a message."""
    # Python refuses to print numbers of more than 4,300 digits (sys.set_int_max_str_digits).
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of about {int(value.bit_length() * math.log10(2)):,} digits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
