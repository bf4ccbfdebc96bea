"""The type of a family: everything known of one form in which models are published in Hugging Face, as data.

A family is a file with one value of `HFFamily`, and its name in table.py. Import, export, their comparison with transformers
and the messages of all of them read the value alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

import torch
from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.interop.tensor_mapping import TensorMapping

NUMBER = int | float
# Endings of constants that older versions of transformers saved beside the weights.
CONSTANT_SUFFIXES = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".embeddings.position_ids")


@dataclass(frozen=True)
class ConfigField:
    """A field of config.json. null is legal where the default is None.

    Attributes:
        types: that transformers accepts for it.
        default: the value of an absent field, as the class in transformers has it.
        native: the name of the same setting here, where one exists.
        fixed: the default is the only value that the model here has.
    """

    types: type | UnionType
    default: Any
    native: str | None = None
    fixed: bool = False


def is_gpt(config: ModelConfig) -> bool:
    """Return whether the model is a GPT."""
    return config.architecture == "gpt"


@dataclass(frozen=True)
class HFClass:
    """A class of transformers.

    Attributes:
        architecture: its name, as `architectures` of config.json gives it.
        templates: the mappings of its tensors, those of a layer once, with `{n}` for its number.
        serves: tells whether the class is for this kind of model at all.
    """

    architecture: str
    templates: tuple[TensorMapping, ...]
    serves: Callable[[ModelConfig], bool] = is_gpt

    def mappings(self, config: ModelConfig) -> Iterator[TensorMapping]:
        """Yield the mapping of every tensor, with the layers' numbers put in."""
        for template in self.templates:
            if "{n}" in template.native:
                yield from (template.for_layer(n) for n in range(config.num_layers))
            else:
                yield template


HFTensors = dict[str, Tensor]  # of a directory, by their names there
ChooseClass = Callable[[ModelConfig, HFTensors, Mapping[str, Any]], tuple[ModelConfig, HFClass]]


@dataclass(frozen=True, kw_only=True)
class HFFamily:
    """A family of models in Hugging Face's form, in both directions.

    Attributes:
        model_type: its name in config.json.
        classes: its classes in transformers. The first that serves a configuration is written.
        fields: every field of config.json that the classes compute with, `tie_word_embeddings` among them, with the class's
            default, which an absent field has.
        aliases: other names of fields, which transformers takes for them.
        causal: the only value that `is_causal` in config.json may have.
        to_settings: makes our settings that follow from more than one field, of the fields' values and the whole config.json.
            CheckpointError for what the model here does not have.
        to_fields: makes the fields of config.json of a resolved configuration of ours.
        unsupported: lists in words what of a configuration the family cannot express.
        unwritten_settings: our settings that it has no field for, though a model may train with them, each with a sentence
            that says so.
        exported: whether models are exported as this family; False where another one that is listed says the same.
        choose_class: tells which class a directory was saved from, and adds to the configuration what its tensors say; of the
            tensors it may take out those that mean nothing. None for the first class.
        tensor_prefix: of the tensors' names; a directory that holds the model without its head lacks it.
        head_prefixes: prefixes of names that such a directory has as they are.
        tied_copies: a tensor that transformers ties to another -> that other one.
        constant_suffixes: endings of names that hold no weights.
    """

    model_type: str
    classes: tuple[HFClass, ...]
    fields: Mapping[str, ConfigField]
    aliases: Mapping[str, str] = field(default_factory=dict)
    causal: bool = True
    to_settings: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    to_fields: Callable[[ModelConfig], dict[str, Any]]
    unsupported: Callable[[ModelConfig], list[str]]
    unwritten_settings: Mapping[str, str] = field(default_factory=dict)
    exported: bool = True
    choose_class: ChooseClass | None = None
    tensor_prefix: str
    head_prefixes: tuple[str, ...] = ("lm_head.", "cls.")
    tied_copies: Mapping[str, str] = field(default_factory=dict)
    constant_suffixes: tuple[str, ...] = CONSTANT_SUFFIXES

    def serves(self, config: ModelConfig) -> bool:
        """Return whether one of the classes is for this kind of model."""
        return any(hf_class.serves(config) for hf_class in self.classes)

    def exported_class(self, config: ModelConfig) -> HFClass:
        """Return the class that a model is written as. ValueError where none is for its kind."""
        for hf_class in self.classes:
            if hf_class.serves(config):
                return hf_class
        raise ValueError(f"the family {self.model_type} has no class for this kind of model")

    def expresses(self, config: ModelConfig) -> bool:
        """Return whether a model can be exported as this family."""
        return self.exported and self.serves(config) and not self.unsupported(config)

    def class_from_tensors(
        self, config: ModelConfig, tensors: HFTensors, hf_config: Mapping[str, Any]
    ) -> tuple[ModelConfig, HFClass]:
        """Return the configuration with what a directory's tensors say, and the class that the directory was saved from.

        Args:
            config: resolved, as config.json describes it.
            tensors: of the directory, by their names there; those that mean nothing are taken out.
            hf_config: the content of config.json.

        Raises:
            CheckpointError: where the tensors are none that the model here can have.
        """
        return (config, self.classes[0]) if self.choose_class is None else self.choose_class(config, tensors, hf_config)

    def mappings(self, config: ModelConfig) -> Iterator[TensorMapping]:
        """Yield the mappings of the class that a model is written as, with the layers' numbers put in."""
        return self.exported_class(config).mappings(config)

    def rounded(self, weights: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the weights as they come back after they were written in `dtype`, under our names.

        They are rounded in the layout of the file, since a conversion may compute: gamma and gamma - 1 round differently.

        Args:
            weights: under our names, whole; all of them have a mapping.
            config: resolved.
            dtype: of the tensors that are written.
        """
        rows = {row.native: row for row in self.mappings(config)}
        back = {}
        for name, tensor in weights.items():
            written = rows[name].conversion.to_hf(tensor, config)
            back[name] = rows[name].conversion.from_hf(tuple(t.to(dtype).to(tensor.dtype) for t in written), config)
        return back
