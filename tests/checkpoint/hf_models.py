"""Directories that transformers wrote, of models whose every weight and setting matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

GPT2: dict[str, Any] = dict(
    vocab_size=61,
    n_positions=24,
    n_embd=16,
    n_layer=2,
    n_head=4,
    n_inner=40,
    activation_function="gelu_new",
    resid_pdrop=0.2,
    embd_pdrop=0.2,
    attn_pdrop=0.3,
    layer_norm_epsilon=3e-3,
    initializer_range=0.05,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA: dict[str, Any] = dict(
    vocab_size=61,
    max_position_embeddings=24,
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    attention_dropout=0.3,
    rms_norm_eps=3e-3,
    initializer_range=0.05,
    bos_token_id=1,
    eos_token_id=2,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)
BERT: dict[str, Any] = dict(
    vocab_size=61,
    max_position_embeddings=24,
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    hidden_act="gelu_new",
    hidden_dropout_prob=0.2,
    attention_probs_dropout_prob=0.3,
    layer_norm_eps=3e-3,
    initializer_range=0.05,
    pad_token_id=3,
)
CLASSES = {"id2label": {0: "no", 1: "yes", 2: "unsure"}, "label2id": {"no": 0, "yes": 1, "unsure": 2}}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2 untied": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "tie_word_embeddings": False}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": None}),
    "bert": ("MegatronBertForPreTraining", "MegatronBertConfig", BERT),
    "bert words": ("MegatronBertForMaskedLM", "MegatronBertConfig", BERT),
    "bert classes": ("MegatronBertForSequenceClassification", "MegatronBertConfig", {**BERT, **CLASSES}),
    "bert choice": ("MegatronBertForMultipleChoice", "MegatronBertConfig", BERT),
    "bert span": ("MegatronBertForQuestionAnswering", "MegatronBertConfig", BERT),
    "bert tags": ("MegatronBertForTokenClassification", "MegatronBertConfig", {**BERT, **CLASSES}),
}


def write_hf_directory(name: str, directory: Path) -> dict[str, Any]:
    """Write the model `name` of MODELS; return the JSON of its config.json, with every field of the class."""
    model_class, config_class, settings = MODELS[name]
    torch.manual_seed(1)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        if name == "bert words":  # the model here has no token types without the binary head
            model.bert.embeddings.token_type_embeddings.weight.zero_()
        for parameter_name, parameter in model.named_parameters():
            if "embed" in parameter_name or ".wte." in parameter_name or ".wpe." in parameter_name:
                parameter.mul_(0.2)  # so faint that an epsilon counts
    model.save_pretrained(directory)
    about: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return about
