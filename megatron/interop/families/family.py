"""The description of a model family of Hugging Face: its fields, classes and tensors as data.

Each family is a file of this package that defines one `HFFamily`, and an entry in table.py. Import, export and the comparison
with transformers get everything they need about a family from this value.
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
# Endings of the names of constants that older versions of transformers saved among the weights.
CONSTANT_SUFFIXES = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".embeddings.position_ids")


@dataclass(frozen=True)
class ConfigField:
    """A field of config.json. It may be null if its default is None.

    Attributes:
        types: the types that transformers accepts.
        default: the value of an absent field in transformers.
        native: our name of the same setting; None if there is none.
        fixed: whether the default is the only value that the model here supports.
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
        architecture: its name, as in `architectures` of config.json.
        templates: the mappings of its tensors; those of the layers are listed once, with `{n}` for the layer's number.
        serves: returns whether the class is for the model's architecture and heads.
    """

    architecture: str
    templates: tuple[TensorMapping, ...]
    serves: Callable[[ModelConfig], bool] = is_gpt

    def mappings(self, config: ModelConfig) -> Iterator[TensorMapping]:
        """Yield the mapping of every tensor, with the numbers of the layers in the names."""
        for template in self.templates:
            if "{n}" in template.native:
                yield from (template.for_layer(n) for n in range(config.num_layers))
            else:
                yield template


HFTensors = dict[str, Tensor]  # the tensors of a Hugging Face directory by their names in its files
ChooseClass = Callable[[ModelConfig, HFTensors, Mapping[str, Any]], tuple[ModelConfig, HFClass]]


@dataclass(frozen=True, kw_only=True)
class HFFamily:
    """A family of models in Hugging Face, described for import and export.

    Attributes:
        model_type: the family's name in config.json.
        classes: its classes in transformers. A model is exported as the first one that serves its configuration.
        fields: every field of config.json that affects what the classes compute, including `tie_word_embeddings`.
        aliases: another name of a field that transformers accepts -> the field's name.
        causal: the only value that `is_causal` in config.json may have.
        to_settings: returns the settings that are not copies of single fields, computed from the values of `fields` and from
            the whole config.json. CheckpointError for values that the model here does not support.
        to_fields: returns the fields of config.json for a resolved configuration.
        unsupported: returns as texts the properties of a configuration that the family cannot express.
        unwritten_settings: training settings of ours that the family has no field for, each with a message about it.
        exported: whether models are exported as this family; False if another listed family expresses the same models.
        choose_class: returns the class that a directory was saved from, and the configuration completed with what the tensors
            show; it may remove tensors without any effect. None if the directory is always of the first class.
        tensor_prefix: the prefix of tensor names, which is absent in a directory that holds the model without its head.
        head_prefixes: prefixes of the tensors of heads, which never get `tensor_prefix`.
        tied_copies: the name of a tied tensor -> the name of the tensor that transformers ties it to.
        constant_suffixes: endings of the names of tensors that are not weights.
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
        """Return whether one of the classes is for the model's architecture and heads."""
        return any(hf_class.serves(config) for hf_class in self.classes)

    def exported_class(self, config: ModelConfig) -> HFClass:
        """Return the class that a model is exported as. ValueError if no class serves it."""
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
        """Return the configuration completed with what the tensors show, and the class that the directory was saved from.

        Args:
            config: the resolved configuration that config.json describes.
            tensors: the directory's tensors by their names there; those without any effect are removed.
            hf_config: the content of config.json.

        Raises:
            CheckpointError: the model here cannot have these tensors.
        """
        return (config, self.classes[0]) if self.choose_class is None else self.choose_class(config, tensors, hf_config)

    def mappings(self, config: ModelConfig) -> Iterator[TensorMapping]:
        """Yield the mappings of the class that a model is exported as, with the numbers of the layers in the names."""
        return self.exported_class(config).mappings(config)

    def rounded(self, weights: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the weights with the rounding of an export in `dtype`, under our names.

        Rounding is applied to the exported tensors, because a conversion may compute: gamma and gamma - 1 round differently.

        Args:
            weights: the whole tensors under our names; each has a mapping.
            config: the resolved configuration.
            dtype: the dtype of the exported tensors.
        """
        rows = {row.native: row for row in self.mappings(config)}
        read_back = {}
        for name, tensor in weights.items():
            exported = rows[name].conversion.to_hf(tensor, config)
            read_back[name] = rows[name].conversion.from_hf(tuple(t.to(dtype).to(tensor.dtype) for t in exported), config)
        return read_back
