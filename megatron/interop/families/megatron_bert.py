"""MegatronBert: layer norms before each sublayer, with the heads of pretraining or with that of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.layout import CheckpointError
from megatron.config.schema import ModelConfig
from megatron.config.task import TASKS
from megatron.interop.families.family import NUMBER, Field, Found, HFClass, HFFamily
from megatron.interop.families.shared import (
    ACTIVATION_NAMES,
    activation,
    ffn_shape,
    hidden_shape,
    positions_shape,
    qkv_shape,
    unsupported_by_gpt2,
)
from megatron.interop.hf_config import architecture
from megatron.interop.tensor_mapping import GAMMA, QKV_IN_THREE, SAME, Row

MAX_CLASSES = 1 << 20


def _segments_shape(config: ModelConfig) -> tuple[int, ...]:
    return (2, config.hidden_size)


def _separate(kind: str) -> tuple[str, ...]:
    return tuple(f"bert.encoder.layer.{{n}}.attention.self.{x}.{kind}" for x in ("query", "key", "value"))


def _has_binary_head(config: ModelConfig) -> bool:
    return config.architecture == "bert" and config.has_binary_head


def _has_words_alone(config: ModelConfig) -> bool:
    return config.architecture == "bert" and config.has_output_layer and not config.has_binary_head


WITH_ORDER = HFClass(
    "MegatronBertForPreTraining",
    (
        Row("embedding.word.weight", ("bert.embeddings.word_embeddings.weight",), SAME),
        Row("embedding.position.weight", ("bert.embeddings.position_embeddings.weight",), SAME, zeros=positions_shape),
        Row("embedding.segment.weight", ("bert.embeddings.token_type_embeddings.weight",), SAME, zeros=_segments_shape),
        Row("layers.{n}.input_norm.weight", ("bert.encoder.layer.{n}.attention.ln.weight",), GAMMA),
        Row("layers.{n}.input_norm.bias", ("bert.encoder.layer.{n}.attention.ln.bias",), SAME, zeros=hidden_shape),
        Row("layers.{n}.attention.qkv.weight", _separate("weight"), QKV_IN_THREE),
        Row("layers.{n}.attention.qkv.bias", _separate("bias"), QKV_IN_THREE, zeros=qkv_shape),
        Row("layers.{n}.attention.dense.weight", ("bert.encoder.layer.{n}.attention.output.dense.weight",), SAME),
        Row(
            "layers.{n}.attention.dense.bias", ("bert.encoder.layer.{n}.attention.output.dense.bias",), SAME, zeros=hidden_shape
        ),
        Row("layers.{n}.mlp_norm.weight", ("bert.encoder.layer.{n}.ln.weight",), GAMMA),
        Row("layers.{n}.mlp_norm.bias", ("bert.encoder.layer.{n}.ln.bias",), SAME, zeros=hidden_shape),
        Row("layers.{n}.mlp.up.weight", ("bert.encoder.layer.{n}.intermediate.dense.weight",), SAME),
        Row("layers.{n}.mlp.up.bias", ("bert.encoder.layer.{n}.intermediate.dense.bias",), SAME, zeros=ffn_shape),
        Row("layers.{n}.mlp.down.weight", ("bert.encoder.layer.{n}.output.dense.weight",), SAME),
        Row("layers.{n}.mlp.down.bias", ("bert.encoder.layer.{n}.output.dense.bias",), SAME, zeros=hidden_shape),
        Row("final_norm.weight", ("bert.encoder.ln.weight",), GAMMA),
        Row("final_norm.bias", ("bert.encoder.ln.bias",), SAME, zeros=hidden_shape),
        Row("pooler.weight", ("bert.pooler.dense.weight",), SAME),
        Row("pooler.bias", ("bert.pooler.dense.bias",), SAME),
        Row("masked_words.dense.weight", ("cls.predictions.transform.dense.weight",), SAME),
        Row("masked_words.dense.bias", ("cls.predictions.transform.dense.bias",), SAME),
        Row("masked_words.norm.weight", ("cls.predictions.transform.LayerNorm.weight",), GAMMA),
        Row("masked_words.norm.bias", ("cls.predictions.transform.LayerNorm.bias",), SAME, zeros=hidden_shape),
        Row("masked_words.bias", ("cls.predictions.bias",), SAME),
        Row("order.weight", ("cls.seq_relationship.weight",), SAME),
        Row("order.bias", ("cls.seq_relationship.bias",), SAME),
    ),
    _has_binary_head,
)
# Without the binary head there is no pooler either; transformers has a class for that.
WORDS_ALONE = HFClass(
    "MegatronBertForMaskedLM",
    tuple(row for row in WITH_ORDER.rows if not row.ours.startswith(("pooler.", "order."))),
    _has_words_alone,
)


def _fine_tuned(head: str, name: str, layer: str, *, pooler: bool) -> HFClass:
    """A BERT with the head of a task. layer: what transformers calls its linear layer."""
    left_out = ("masked_words.", "order.") if pooler else ("masked_words.", "order.", "pooler.")
    body = [row for row in WITH_ORDER.rows if not row.ours.startswith(left_out)]
    own = [Row(f"task_head.{kind}", (f"{layer}.{kind}",), SAME) for kind in ("weight", "bias")]
    return HFClass(f"MegatronBertFor{name}", (*body, *own), lambda config: config.task_head == head)


FINE_TUNED: Mapping[str, HFClass] = MappingProxyType(
    {
        "classification": _fine_tuned("classification", "SequenceClassification", "classifier", pooler=True),
        "choice": _fine_tuned("choice", "MultipleChoice", "classifier", pooler=True),
        "span": _fine_tuned("span", "QuestionAnswering", "qa_outputs", pooler=False),
        "tags": _fine_tuned("tags", "TokenClassification", "classifier", pooler=False),
    }
)
FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        "vocab_size": Field(int, 29056, "vocab_size"),
        "hidden_size": Field(int, 1024, "hidden_size"),
        "num_hidden_layers": Field(int, 24, "num_layers"),
        "num_attention_heads": Field(int, 16, "num_attention_heads"),
        "intermediate_size": Field(int, 4096, "ffn_hidden_size"),
        "hidden_act": Field(str, "gelu"),
        "hidden_dropout_prob": Field(NUMBER, 0.1, "hidden_dropout"),
        "attention_probs_dropout_prob": Field(NUMBER, 0.1, "attention_dropout"),
        "max_position_embeddings": Field(int, 512, "max_position_embeddings"),
        "type_vocab_size": Field(int, 2, fixed=True),
        "initializer_range": Field(float, 0.02, "init_method_std"),
        "layer_norm_eps": Field(float, 1e-12, "layernorm_epsilon"),
        "is_decoder": Field(bool, False, fixed=True),
        "add_cross_attention": Field(bool, False, fixed=True),
        "tie_word_embeddings": Field(bool, True, fixed=True),
        "position_embedding_type": Field(str, "absolute", fixed=True),  # of Transformers 4
    }
)


def _settings(values: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    return {"architecture": "bert", "activation": activation(values["hidden_act"], "hidden_act")}


def _config(config: ModelConfig) -> dict[str, Any]:
    """With the names of a task's classes; of a choice and a span the outputs have none."""
    about: dict[str, Any] = {
        "vocab_size": config.known_vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "type_vocab_size": 2,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "layer_norm_eps": config.layernorm_epsilon,
    }
    if config.task_head in ("classification", "tags"):
        about["id2label"] = {str(number): label for number, label in enumerate(config.labels)}
        about["label2id"] = {label: number for number, label in enumerate(config.labels)}
    return about


def _class_of(config: ModelConfig, found: Found, about: Mapping[str, Any]) -> tuple[ModelConfig, HFClass]:
    """Return the configuration and the class of a model: fine-tuned, with the binary head, or without.

    Without it the model here has no token types; then those there must mean nothing.
    """
    named = architecture(about)
    head = next((head for head, tuned in FINE_TUNED.items() if tuned.architecture == named), None)
    if head is not None:
        return replace(config, task_head=head, labels=_labels(head, found, about)), FINE_TUNED[head]
    pooled = any(name.startswith(("bert.pooler.", "cls.seq_relationship.")) for name in found)
    if pooled or named == WITH_ORDER.architecture:
        return config, WITH_ORDER
    types = found.get("bert.embeddings.token_type_embeddings.weight")
    if types is not None and types.any():
        raise CheckpointError(
            "it has token types and no cls.seq_relationship; open it as MegatronBertForPreTraining and save it, and import that"
        )
    rows = tuple(row for row in WORDS_ALONE.rows if row.ours != "embedding.segment.weight")
    found.pop("bert.embeddings.token_type_embeddings.weight", None)
    return replace(config, bert_binary_head=False), replace(WORDS_ALONE, rows=rows)


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


def class_names(about: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes that a task's head tells apart, those that transformers gives where nobody named them."""
    named, count = about.get("id2label"), about.get("num_labels")
    if named is not None and (not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values())):
        raise CheckpointError("`id2label` of config.json names no classes")
    if count is not None and (type(count) is not int or not 1 <= count <= MAX_CLASSES):
        raise CheckpointError(f"`num_labels` of config.json is {count!r}, which makes no sense")
    if named is None:
        return tuple(f"LABEL_{number}" for number in range(2 if count is None else count))
    if count is not None and count != len(named):
        raise CheckpointError(f"`num_labels` is {count}, and `id2label` of config.json has {len(named)}")
    if named.keys() != {str(number) for number in range(len(named))}:
        raise CheckpointError(f"`id2label` of config.json numbers its {len(named)} classes otherwise than from 0 on")
    return tuple(named[str(number)] for number in range(len(named)))


MEGATRON_BERT = HFFamily(
    model_type="megatron-bert",
    classes=(WITH_ORDER, WORDS_ALONE, *FINE_TUNED.values()),
    fields=FIELDS,
    causal=False,
    settings=_settings,
    config=_config,
    unsupported=unsupported_by_gpt2,
    choose=_class_of,
    prefix="bert.",
    copies=MappingProxyType(
        {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }
    ),
)
