"""MegatronBert: layer norms before each sublayer, with the heads of pretraining or the head of a task."""

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
from megatron.interop.families.family import NUMBER, ConfigField, HFClass, HFFamily, HFTensors
from megatron.interop.families.shared import (
    ACTIVATION_NAMES,
    activation_from_hf,
    ffn_shape,
    hidden_shape,
    positions_shape,
    qkv_shape,
    unsupported_by_gpt2,
)
from megatron.interop.hf_config import saved_class
from megatron.interop.tensor_mapping import GAMMA, QKV_IN_THREE, SAME, TensorMapping

MAX_CLASSES = 1 << 20  # of a head: a larger `num_labels` would only fill the memory with names


def _segments_shape(config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of the embedding of the two token types, first and second segment."""
    return (2, config.hidden_size)


def _projections(kind: str) -> tuple[str, ...]:
    """Return the names of the query, key and value tensors. kind: `weight` or `bias`."""
    return tuple(f"bert.encoder.layer.{{n}}.attention.self.{x}.{kind}" for x in ("query", "key", "value"))


def _has_binary_head(config: ModelConfig) -> bool:
    return config.architecture == "bert" and config.has_binary_head


def _has_only_masked_words(config: ModelConfig) -> bool:
    return config.architecture == "bert" and config.has_output_layer and not config.has_binary_head


# The names of transformers.MegatronBertForPreTraining, whose weights of linear layers are [out, in]. The decoder of the masked
# words has no row, since it is tied to the word embeddings.
WITH_ORDER = HFClass(
    "MegatronBertForPreTraining",
    (
        TensorMapping("embedding.word.weight", ("bert.embeddings.word_embeddings.weight",), SAME),  # [vocab, hidden]
        TensorMapping(
            "embedding.position.weight", ("bert.embeddings.position_embeddings.weight",), SAME, zeros_shape=positions_shape
        ),
        TensorMapping(
            "embedding.segment.weight", ("bert.embeddings.token_type_embeddings.weight",), SAME, zeros_shape=_segments_shape
        ),
        TensorMapping("layers.{n}.input_norm.weight", ("bert.encoder.layer.{n}.attention.ln.weight",), GAMMA),
        TensorMapping(
            "layers.{n}.input_norm.bias", ("bert.encoder.layer.{n}.attention.ln.bias",), SAME, zeros_shape=hidden_shape
        ),
        TensorMapping("layers.{n}.attention.qkv.weight", _projections("weight"), QKV_IN_THREE),  # [hidden, hidden] each
        TensorMapping("layers.{n}.attention.qkv.bias", _projections("bias"), QKV_IN_THREE, zeros_shape=qkv_shape),
        TensorMapping("layers.{n}.attention.dense.weight", ("bert.encoder.layer.{n}.attention.output.dense.weight",), SAME),
        TensorMapping(
            "layers.{n}.attention.dense.bias",
            ("bert.encoder.layer.{n}.attention.output.dense.bias",),
            SAME,
            zeros_shape=hidden_shape,
        ),
        TensorMapping("layers.{n}.mlp_norm.weight", ("bert.encoder.layer.{n}.ln.weight",), GAMMA),
        TensorMapping("layers.{n}.mlp_norm.bias", ("bert.encoder.layer.{n}.ln.bias",), SAME, zeros_shape=hidden_shape),
        TensorMapping("layers.{n}.mlp.up.weight", ("bert.encoder.layer.{n}.intermediate.dense.weight",), SAME),
        TensorMapping(
            "layers.{n}.mlp.up.bias", ("bert.encoder.layer.{n}.intermediate.dense.bias",), SAME, zeros_shape=ffn_shape
        ),
        TensorMapping("layers.{n}.mlp.down.weight", ("bert.encoder.layer.{n}.output.dense.weight",), SAME),  # [hidden, ffn]
        TensorMapping(
            "layers.{n}.mlp.down.bias", ("bert.encoder.layer.{n}.output.dense.bias",), SAME, zeros_shape=hidden_shape
        ),
        TensorMapping("final_norm.weight", ("bert.encoder.ln.weight",), GAMMA),
        TensorMapping("final_norm.bias", ("bert.encoder.ln.bias",), SAME, zeros_shape=hidden_shape),
        TensorMapping("pooler.weight", ("bert.pooler.dense.weight",), SAME),  # [hidden, hidden]
        TensorMapping("pooler.bias", ("bert.pooler.dense.bias",), SAME),
        TensorMapping("masked_words.dense.weight", ("cls.predictions.transform.dense.weight",), SAME),  # [hidden, hidden]
        TensorMapping("masked_words.dense.bias", ("cls.predictions.transform.dense.bias",), SAME),
        TensorMapping("masked_words.norm.weight", ("cls.predictions.transform.LayerNorm.weight",), GAMMA),
        TensorMapping("masked_words.norm.bias", ("cls.predictions.transform.LayerNorm.bias",), SAME, zeros_shape=hidden_shape),
        TensorMapping("masked_words.bias", ("cls.predictions.bias",), SAME),  # [vocab]
        TensorMapping("order.weight", ("cls.seq_relationship.weight",), SAME),  # [2, hidden]
        TensorMapping("order.bias", ("cls.seq_relationship.bias",), SAME),
    ),
    _has_binary_head,
)
# The class without the binary head, and so without the pooler.
WORDS_ALONE = HFClass(
    "MegatronBertForMaskedLM",
    tuple(row for row in WITH_ORDER.templates if not row.native.startswith(("pooler.", "order."))),
    _has_only_masked_words,
)


def _fine_tuned(head: str, name: str, layer: str, *, pooler: bool) -> HFClass:
    """Return the class of a BERT with the head of a task.

    Args:
        head: our name of the head, `task_head` of the configuration.
        name: the name of the class without the prefix `MegatronBertFor`.
        layer: the name in transformers of the head's linear layer.
        pooler: whether the head's input is the pooler's output; otherwise it is the encoder's output at every token.
    """
    left_out = ("masked_words.", "order.") if pooler else ("masked_words.", "order.", "pooler.")
    encoder = [row for row in WITH_ORDER.templates if not row.native.startswith(left_out)]
    linear = [TensorMapping(f"task_head.{kind}", (f"{layer}.{kind}",), SAME) for kind in ("weight", "bias")]
    return HFClass(f"MegatronBertFor{name}", (*encoder, *linear), lambda config: config.task_head == head)


FINE_TUNED: Mapping[str, HFClass] = MappingProxyType(
    {
        "classification": _fine_tuned("classification", "SequenceClassification", "classifier", pooler=True),
        "choice": _fine_tuned("choice", "MultipleChoice", "classifier", pooler=True),
        "span": _fine_tuned("span", "QuestionAnswering", "qa_outputs", pooler=False),
        "tags": _fine_tuned("tags", "TokenClassification", "classifier", pooler=False),
    }
)
# The defaults are those of transformers.MegatronBertConfig.
FIELDS: Mapping[str, ConfigField] = MappingProxyType(
    {
        "vocab_size": ConfigField(int, 29056, "vocab_size"),
        "hidden_size": ConfigField(int, 1024, "hidden_size"),
        "num_hidden_layers": ConfigField(int, 24, "num_layers"),
        "num_attention_heads": ConfigField(int, 16, "num_attention_heads"),
        "intermediate_size": ConfigField(int, 4096, "ffn_hidden_size"),
        "hidden_act": ConfigField(str, "gelu"),
        "hidden_dropout_prob": ConfigField(NUMBER, 0.1, "hidden_dropout"),
        "attention_probs_dropout_prob": ConfigField(NUMBER, 0.1, "attention_dropout"),
        "max_position_embeddings": ConfigField(int, 512, "max_position_embeddings"),
        "type_vocab_size": ConfigField(int, 2, fixed=True),
        "initializer_range": ConfigField(float, 0.02, "init_method_std"),
        "layer_norm_eps": ConfigField(float, 1e-12, "layernorm_epsilon"),
        "is_decoder": ConfigField(bool, False, fixed=True),
        "add_cross_attention": ConfigField(bool, False, fixed=True),
        "tie_word_embeddings": ConfigField(bool, True, fixed=True),
        "position_embedding_type": ConfigField(str, "absolute", fixed=True),  # only in Transformers 4
    }
)


def _to_settings(values: Mapping[str, Any], hf_config: Mapping[str, Any]) -> dict[str, Any]:
    return {"architecture": "bert", "activation": activation_from_hf(values["hidden_act"], "hidden_act")}


def _to_fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields, with the names of the task's classes; "choice" and "span" heads have none."""
    hf_config: dict[str, Any] = {
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
        hf_config["id2label"] = {str(number): label for number, label in enumerate(config.labels)}
        hf_config["label2id"] = {label: number for number, label in enumerate(config.labels)}
    return hf_config


def _choose_class(config: ModelConfig, tensors: HFTensors, hf_config: Mapping[str, Any]) -> tuple[ModelConfig, HFClass]:
    """Choose among the fine-tuned classes, the class with the binary head, and the one without.

    Without the binary head the model here has no token types, so the directory's embedding of token types must be zeros.
    """
    architecture = saved_class(hf_config)
    head = next((head for head, tuned in FINE_TUNED.items() if tuned.architecture == architecture), None)
    if head is not None:
        return replace(config, task_head=head, labels=_labels(head, tensors, hf_config)), FINE_TUNED[head]
    pooled = any(name.startswith(("bert.pooler.", "cls.seq_relationship.")) for name in tensors)
    if pooled or architecture == WITH_ORDER.architecture:
        return config, WITH_ORDER
    token_types = tensors.get("bert.embeddings.token_type_embeddings.weight")  # [2, hidden]
    if token_types is not None and token_types.any():
        raise CheckpointError(
            "it has token types but no cls.seq_relationship; open it as MegatronBertForPreTraining, save it and import that"
        )
    templates = tuple(row for row in WORDS_ALONE.templates if row.native != "embedding.segment.weight")
    tensors.pop("bert.embeddings.token_type_embeddings.weight", None)
    return replace(config, bert_binary_head=False), replace(WORDS_ALONE, templates=templates)


def _labels(head: str, tensors: Mapping[str, Tensor], hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a head's classes. CheckpointError if its tensors have another number of classes."""
    if head == "choice":  # config.json does not contain the number of choices
        return TASKS["RACE"].labels
    names = class_names(hf_config)
    outputs = tensors.get("qa_outputs.weight" if head == "span" else "classifier.weight", torch.empty(0)).shape[
        :1
    ]  # of [classes, hidden]
    if outputs and outputs[0] != len(names):
        raise CheckpointError(f"config.json has {len(names)} classes (`id2label`, `num_labels`), the head {outputs[0]}")
    if head == "classification" and (
        hf_config.get("problem_type") not in (None, "single_label_classification") or len(names) < 2
    ):
        problem = hf_config.get("problem_type") or "regression"  # transformers' default where there is a single class
        raise CheckpointError(f"`problem_type` is {problem!r}; the model here predicts one of several classes for each sample")
    return () if head == "span" else names


def class_names(hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes of a task's head, by default those of transformers: `LABEL_0` and so on."""
    named, count = hf_config.get("id2label"), hf_config.get("num_labels")
    if named is not None and (not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values())):
        raise CheckpointError("`id2label` of config.json is not an object of names")
    if count is not None and (type(count) is not int or not 1 <= count <= MAX_CLASSES):
        raise CheckpointError(f"`num_labels` of config.json is {count!r}, which makes no sense")
    if named is None:
        return tuple(f"LABEL_{number}" for number in range(2 if count is None else count))
    if count is not None and count != len(named):
        raise CheckpointError(f"`num_labels` is {count}, and `id2label` of config.json has {len(named)}")
    if named.keys() != {str(number) for number in range(len(named))}:
        raise CheckpointError(f"`id2label` of config.json does not number its {len(named)} classes from 0 on")
    return tuple(named[str(number)] for number in range(len(named)))


MEGATRON_BERT = HFFamily(
    model_type="megatron-bert",
    classes=(WITH_ORDER, WORDS_ALONE, *FINE_TUNED.values()),
    fields=FIELDS,
    causal=False,
    to_settings=_to_settings,
    to_fields=_to_fields,
    unsupported=unsupported_by_gpt2,
    choose_class=_choose_class,
    tensor_prefix="bert.",
    tied_copies=MappingProxyType(
        {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }
    ),
)
