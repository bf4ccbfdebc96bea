"""The two kinds of models that NVIDIA released, and the config.json that Transformers 4's scripts wrote for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron.interop.families.family import HFFamily
from megatron.interop.families.gpt2 import GPT2
from megatron.interop.families.megatron_bert import MEGATRON_BERT

SIZE_SETTINGS = ("vocab_size", "max_position_embeddings", "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size")


@dataclass(frozen=True)
class ReleasedKind:
    """A kind of released model, which one of the two commands converts.

    Attributes:
        name: the model's name, for messages.
        family: the family of transformers that it is written as.
        defaults: the fields of config.json of the released model.
        tool: the path of the script that converts it.
    """

    name: str
    family: HFFamily
    defaults: Mapping[str, Any]
    tool: str

    @property
    def size_fields(self) -> dict[str, str]:
        """Map our name of each size to its name in config.json."""
        names = {field.native: name for name, field in self.family.fields.items()}
        return {ours: names[ours] for ours in SIZE_SETTINGS}

    @property
    def default_sizes(self) -> dict[str, Any]:
        """Map each size in config.json to transformers' default, which applies if a --config_file lacks the size."""
        return {name: self.family.fields[name].default for name in self.size_fields.values()}


GPT2_KIND = ReleasedKind(
    name="GPT-2",
    family=GPT2,
    defaults=MappingProxyType(
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 1024,
            "n_layer": 24,
            "n_head": 16,
            "n_inner": 4096,
            "activation_function": "gelu_new",
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "attn_pdrop": 0.1,
            "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "summary_activation": None,
            "summary_proj_to_labels": True,
            "summary_first_dropout": 0.1,
            "scale_attn_weights": True,
            "use_cache": True,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
            "tokenizer_class": "GPT2TokenizerFast",
        }
    ),
    tool="tools/convert_megatron_gpt2_checkpoint.py",
)
BERT_KIND = ReleasedKind(
    name="BERT",
    family=MEGATRON_BERT,
    defaults=MappingProxyType(
        {
            "model_type": "megatron-bert",
            "architectures": ["MegatronBertForPreTraining"],
            "vocab_size": 29056,
            "max_position_embeddings": 512,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "type_vocab_size": 2,
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-12,
            "pad_token_id": 0,
            "use_cache": True,
        }
    ),
    tool="tools/convert_megatron_bert_checkpoint.py",
)
