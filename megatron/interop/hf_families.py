"""Names and forms of the same weights in Hugging Face's model families: one table per family, read in both directions.

A row says which of our tensors is which of theirs, and how the one becomes the other. `config.json` and what a family cannot
express stand beside its table. To add a family, write one more table and its two functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.interop.tensor_mapping import CONV1D, GAMMA, QKV_IN_ONE, QKV_IN_THREE, SAME, Family, Row


def _hidden(config: ModelConfig) -> tuple[int, ...]:
    return (config.size("hidden_size"),)


def _ffn(config: ModelConfig) -> tuple[int, ...]:
    return (config.size("ffn_hidden_size"),)


def _qkv(config: ModelConfig) -> tuple[int, ...]:
    return ((config.size("num_attention_heads") + 2 * config.size("num_query_groups")) * config.size("kv_channels"),)


def _positions(config: ModelConfig) -> tuple[int, ...]:
    return (config.size("max_position_embeddings"), config.size("hidden_size"))


def _segments(config: ModelConfig) -> tuple[int, ...]:
    return (2, config.size("hidden_size"))


def _shared_obstacles(config: ModelConfig) -> list[str]:
    if config.apply_residual_connection_post_layernorm:
        return ["the residual is taken from the norm's output (--apply-residual-connection-post-layernorm)"]
    return []


GPT2_ACTIVATIONS = {"gelu": "gelu_new", "gelu-exact": "gelu", "squared-relu": "relu2"}


def _gpt2_obstacles(config: ModelConfig) -> list[str]:
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    found = _shared_obstacles(config)
    if config.normalization != "LayerNorm":
        found.append(f"--normalization {config.normalization}: it has LayerNorm")
    if config.position_embedding_type == "rope":
        found.append("--position-embedding-type rope: it has learned positions")
    if config.activation not in GPT2_ACTIVATIONS:
        found.append(f"--{config.activation}: its MLP has no gate")
    if config.size("num_query_groups") != heads:
        found.append(f"--num-query-groups {config.num_query_groups}: it has one key-value head per query head")
    if config.size("kv_channels") * heads != hidden:
        found.append(f"--kv-channels {config.kv_channels}: its heads are hidden / heads = {hidden / heads:g} wide")
    return found


def _gpt2_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": config.size("vocab_size"),
        "n_positions": config.size("max_position_embeddings"),
        "n_embd": config.size("hidden_size"),
        "n_layer": config.size("num_layers"),
        "n_head": config.size("num_attention_heads"),
        "n_inner": config.size("ffn_hidden_size"),
        "activation_function": GPT2_ACTIVATIONS[config.activation],
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
        "attn_pdrop": config.attention_dropout,
        "layer_norm_epsilon": config.layernorm_epsilon,
    }


GPT2 = Family(
    "GPT2LMHeadModel",
    (
        Row("embedding.word.weight", ("transformer.wte.weight",), SAME),
        Row("embedding.position.weight", ("transformer.wpe.weight",), SAME, zeros=_positions),
        Row("layers.{n}.input_norm.weight", ("transformer.h.{n}.ln_1.weight",), GAMMA),
        Row("layers.{n}.input_norm.bias", ("transformer.h.{n}.ln_1.bias",), SAME, zeros=_hidden),
        Row("layers.{n}.attention.qkv.weight", ("transformer.h.{n}.attn.c_attn.weight",), QKV_IN_ONE),
        Row("layers.{n}.attention.qkv.bias", ("transformer.h.{n}.attn.c_attn.bias",), QKV_IN_ONE, zeros=_qkv),
        Row("layers.{n}.attention.dense.weight", ("transformer.h.{n}.attn.c_proj.weight",), CONV1D),
        Row("layers.{n}.attention.dense.bias", ("transformer.h.{n}.attn.c_proj.bias",), SAME, zeros=_hidden),
        Row("layers.{n}.mlp_norm.weight", ("transformer.h.{n}.ln_2.weight",), GAMMA),
        Row("layers.{n}.mlp_norm.bias", ("transformer.h.{n}.ln_2.bias",), SAME, zeros=_hidden),
        Row("layers.{n}.mlp.up.weight", ("transformer.h.{n}.mlp.c_fc.weight",), CONV1D),
        Row("layers.{n}.mlp.up.bias", ("transformer.h.{n}.mlp.c_fc.bias",), SAME, zeros=_ffn),
        Row("layers.{n}.mlp.down.weight", ("transformer.h.{n}.mlp.c_proj.weight",), CONV1D),
        Row("layers.{n}.mlp.down.bias", ("transformer.h.{n}.mlp.c_proj.bias",), SAME, zeros=_hidden),
        Row("final_norm.weight", ("transformer.ln_f.weight",), GAMMA),
        Row("final_norm.bias", ("transformer.ln_f.bias",), SAME, zeros=_hidden),
        Row("head.weight", ("lm_head.weight",), SAME),
    ),
    _gpt2_obstacles,
    _gpt2_config,
)


def _llama_obstacles(config: ModelConfig) -> list[str]:
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    found = _shared_obstacles(config)
    if config.normalization != "RMSNorm":
        found.append(f"--normalization {config.normalization}: it has RMSNorm")
    if config.position_embedding_type != "rope":
        found.append(f"--position-embedding-type {config.position_embedding_type}: it has rope")
    elif config.rotary_percent != 1.0:
        found.append(f"--rotary-percent {config.rotary_percent:g}: it turns the whole head")
    elif config.rotary_interleaved:
        found.append("--rotary-interleaved: it turns the halves of a head")
    if config.activation != "swiglu":
        found.append(f"the activation {config.activation}: it has --swiglu")
    if hidden % heads:
        found.append(f"--hidden-size {hidden}: transformers wants a multiple of the {heads} heads")
    return found


def _llama_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": config.size("vocab_size"),
        "max_position_embeddings": config.size("max_position_embeddings"),
        "hidden_size": config.size("hidden_size"),
        "intermediate_size": config.size("ffn_hidden_size"),
        "num_hidden_layers": config.size("num_layers"),
        "num_attention_heads": config.size("num_attention_heads"),
        "num_key_value_heads": config.size("num_query_groups"),
        "head_dim": config.size("kv_channels"),
        "hidden_act": "silu",
        "rms_norm_eps": config.layernorm_epsilon,
        "attention_bias": config.add_bias_linear,
        "mlp_bias": config.add_bias_linear,
        "attention_dropout": config.attention_dropout,
        # Transformers 4 reads the first, Transformers 5 the second.
        "rope_theta": config.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
    }


def _projections(kind: str) -> tuple[str, ...]:
    return tuple(f"model.layers.{{n}}.self_attn.{x}_proj.{kind}" for x in "qkv")


LLAMA = Family(
    "LlamaForCausalLM",
    (
        Row("embedding.word.weight", ("model.embed_tokens.weight",), SAME),
        Row("layers.{n}.input_norm.weight", ("model.layers.{n}.input_layernorm.weight",), GAMMA),
        Row("layers.{n}.attention.qkv.weight", _projections("weight"), QKV_IN_THREE),
        Row("layers.{n}.attention.qkv.bias", _projections("bias"), QKV_IN_THREE),
        Row("layers.{n}.attention.dense.weight", ("model.layers.{n}.self_attn.o_proj.weight",), SAME),
        Row("layers.{n}.attention.dense.bias", ("model.layers.{n}.self_attn.o_proj.bias",), SAME),
        Row("layers.{n}.mlp_norm.weight", ("model.layers.{n}.post_attention_layernorm.weight",), GAMMA),
        Row("layers.{n}.mlp.gate.weight", ("model.layers.{n}.mlp.gate_proj.weight",), SAME),
        Row("layers.{n}.mlp.gate.bias", ("model.layers.{n}.mlp.gate_proj.bias",), SAME),
        Row("layers.{n}.mlp.up.weight", ("model.layers.{n}.mlp.up_proj.weight",), SAME),
        Row("layers.{n}.mlp.up.bias", ("model.layers.{n}.mlp.up_proj.bias",), SAME),
        Row("layers.{n}.mlp.down.weight", ("model.layers.{n}.mlp.down_proj.weight",), SAME),
        Row("layers.{n}.mlp.down.bias", ("model.layers.{n}.mlp.down_proj.bias",), SAME),
        Row("final_norm.weight", ("model.norm.weight",), GAMMA),
        Row("head.weight", ("lm_head.weight",), SAME),
    ),
    _llama_obstacles,
    _llama_config,
)


def _is_bert_with_binary_head(config: ModelConfig) -> bool:
    return config.architecture == "bert" and config.predicts_order


def _is_bert_without_binary_head(config: ModelConfig) -> bool:
    return config.architecture == "bert" and config.predicts_words and not config.predicts_order


def _megatron_bert_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "megatron-bert",
        "vocab_size": config.size("vocab_size"),
        "max_position_embeddings": config.size("max_position_embeddings"),
        "hidden_size": config.size("hidden_size"),
        "intermediate_size": config.size("ffn_hidden_size"),
        "num_hidden_layers": config.size("num_layers"),
        "num_attention_heads": config.size("num_attention_heads"),
        "type_vocab_size": 2,
        "hidden_act": GPT2_ACTIVATIONS[config.activation],
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "layer_norm_eps": config.layernorm_epsilon,
    }


def _separate(kind: str) -> tuple[str, ...]:
    return tuple(f"bert.encoder.layer.{{n}}.attention.self.{x}.{kind}" for x in ("query", "key", "value"))


MEGATRON_BERT = Family(
    "MegatronBertForPreTraining",
    (
        Row("embedding.word.weight", ("bert.embeddings.word_embeddings.weight",), SAME),
        Row("embedding.position.weight", ("bert.embeddings.position_embeddings.weight",), SAME, zeros=_positions),
        Row("embedding.segment.weight", ("bert.embeddings.token_type_embeddings.weight",), SAME, zeros=_segments),
        Row("layers.{n}.input_norm.weight", ("bert.encoder.layer.{n}.attention.ln.weight",), GAMMA),
        Row("layers.{n}.input_norm.bias", ("bert.encoder.layer.{n}.attention.ln.bias",), SAME, zeros=_hidden),
        Row("layers.{n}.attention.qkv.weight", _separate("weight"), QKV_IN_THREE),
        Row("layers.{n}.attention.qkv.bias", _separate("bias"), QKV_IN_THREE, zeros=_qkv),
        Row("layers.{n}.attention.dense.weight", ("bert.encoder.layer.{n}.attention.output.dense.weight",), SAME),
        Row("layers.{n}.attention.dense.bias", ("bert.encoder.layer.{n}.attention.output.dense.bias",), SAME, zeros=_hidden),
        Row("layers.{n}.mlp_norm.weight", ("bert.encoder.layer.{n}.ln.weight",), GAMMA),
        Row("layers.{n}.mlp_norm.bias", ("bert.encoder.layer.{n}.ln.bias",), SAME, zeros=_hidden),
        Row("layers.{n}.mlp.up.weight", ("bert.encoder.layer.{n}.intermediate.dense.weight",), SAME),
        Row("layers.{n}.mlp.up.bias", ("bert.encoder.layer.{n}.intermediate.dense.bias",), SAME, zeros=_ffn),
        Row("layers.{n}.mlp.down.weight", ("bert.encoder.layer.{n}.output.dense.weight",), SAME),
        Row("layers.{n}.mlp.down.bias", ("bert.encoder.layer.{n}.output.dense.bias",), SAME, zeros=_hidden),
        Row("final_norm.weight", ("bert.encoder.ln.weight",), GAMMA),
        Row("final_norm.bias", ("bert.encoder.ln.bias",), SAME, zeros=_hidden),
        Row("pooler.weight", ("bert.pooler.dense.weight",), SAME),
        Row("pooler.bias", ("bert.pooler.dense.bias",), SAME),
        Row("masked_words.dense.weight", ("cls.predictions.transform.dense.weight",), SAME),
        Row("masked_words.dense.bias", ("cls.predictions.transform.dense.bias",), SAME),
        Row("masked_words.norm.weight", ("cls.predictions.transform.LayerNorm.weight",), GAMMA),
        Row("masked_words.norm.bias", ("cls.predictions.transform.LayerNorm.bias",), SAME, zeros=_hidden),
        Row("masked_words.bias", ("cls.predictions.bias",), SAME),
        Row("order.weight", ("cls.seq_relationship.weight",), SAME),
        Row("order.bias", ("cls.seq_relationship.bias",), SAME),
    ),
    _gpt2_obstacles,
    _megatron_bert_config,
    _is_bert_with_binary_head,
)

# Without the binary head there is no pooler either; transformers has a class for that.
MEGATRON_BERT_WORDS = replace(
    MEGATRON_BERT,
    architecture="MegatronBertForMaskedLM",
    rows=tuple(row for row in MEGATRON_BERT.rows if not row.ours.startswith(("pooler.", "order."))),
    serves=_is_bert_without_binary_head,
)


def _fine_tuned_config(config: ModelConfig) -> dict[str, Any]:
    """With the names of the classes; of a choice and a span the outputs have none."""
    about = _megatron_bert_config(config)
    if config.task_head in ("classification", "tags"):
        about["id2label"] = {str(number): label for number, label in enumerate(config.labels)}
        about["label2id"] = {label: number for number, label in enumerate(config.labels)}
    return about


def _fine_tuned(head: str, architecture: str, layer: str, *, pooler: bool) -> Family:
    """A BERT with the head of a task. layer: what transformers calls its linear layer."""
    left_out = ("masked_words.", "order.") if pooler else ("masked_words.", "order.", "pooler.")
    body = [row for row in MEGATRON_BERT.rows if not row.ours.startswith(left_out)]
    own = [Row(f"task_head.{kind}", (f"{layer}.{kind}",), SAME) for kind in ("weight", "bias")]
    return Family(architecture, (*body, *own), _gpt2_obstacles, _fine_tuned_config, lambda config: config.task_head == head)


FINE_TUNED: Mapping[str, Family] = MappingProxyType(
    {
        head: _fine_tuned(head, f"MegatronBertFor{name}", layer, pooler=pooler)
        for head, name, layer, pooler in (
            ("classification", "SequenceClassification", "classifier", True),
            ("choice", "MultipleChoice", "classifier", True),
            ("span", "QuestionAnswering", "qa_outputs", False),
            ("tags", "TokenClassification", "classifier", False),
        )
    }
)

FAMILIES = (GPT2, LLAMA, MEGATRON_BERT, MEGATRON_BERT_WORDS, *FINE_TUNED.values())


def family_of(config: ModelConfig) -> Family:
    """The family that can express `config`. ValueError with everything that stands in the way, when none can."""
    families = [family for family in FAMILIES if family.serves(config)]
    reasons = {family.architecture: family.obstacles(config) for family in families}
    for family in families:
        if not reasons[family.architecture]:
            return family
    listed = "; ".join(f"{name} cannot express {', '.join(why)}" for name, why in reasons.items())
    raise ValueError(f"no Hugging Face family has this architecture: {listed}")


def rounded(ours: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights as they come back after they were written in `dtype`: what an export in half precision is compared with."""
    rows = {row.ours: row for row in family_of(config).table(config)}
    return {
        name: rows[name].form.read(tuple(t.to(dtype).to(tensor.dtype) for t in rows[name].form.write(tensor, config)), config)
        for name, tensor in ours.items()
    }
