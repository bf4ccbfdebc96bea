"""Sizes of published models, as fields of `ModelSettings`.

Choose one with `--preset NAME`, with `preset = "NAME"` in TOML, or from Python with `ModelSettings(**PRESETS["gpt2-125m"])`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


def _gpt(layers: int, hidden: int, heads: int) -> Mapping[str, Any]:
    """Return the settings of a GPT-2 architecture. `hidden` is the hidden size."""
    return MappingProxyType(
        dict(num_layers=layers, hidden_size=hidden, num_attention_heads=heads, max_position_embeddings=1024)
    )


def _llama(layers: int, hidden: int, heads: int, ffn: int, positions: int) -> Mapping[str, Any]:
    """Return the settings of a Llama architecture. `ffn` is the hidden size of the MLP, `positions` the maximum length."""
    return MappingProxyType(
        dict(
            num_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            ffn_hidden_size=ffn,
            max_position_embeddings=positions,
            position_embedding_type="rope",
            normalization="RMSNorm",
            activation="swiglu",
            add_bias_linear=False,
            untie_embeddings_and_output_weights=True,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )
    )


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gpt2-125m": _gpt(12, 768, 12),  # GPT-2 small
        "gpt2-345m": _gpt(24, 1024, 16),  # GPT-2 medium, the released Megatron-LM checkpoint
        "gpt-1.2b": _gpt(40, 1536, 16),  # arXiv 1909.08053, table 1
        "gpt-8.3b": _gpt(72, 3072, 32),  # the largest model of the same table
        "llama-7b": _llama(32, 4096, 32, 11008, 4096),  # Llama 2, arXiv 2307.09288
    }
)
