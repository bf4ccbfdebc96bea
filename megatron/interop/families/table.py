"""The families that can be imported and exported, by the `model_type` of their config.json.

A package outside this one adds a family by an entry point of the group `megatron.families`, in its pyproject.toml:

    [project.entry-points."megatron.families"]
    toy_llama = "my_package.toy_llama:TOY_LLAMA"

TOY_LLAMA is an `HFFamily`, and the entry point's name is its `model_type`. The package is imported where the family is used,
or where none of our own can express a model that is exported; it cannot take the name of one of our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint
from types import MappingProxyType

from megatron.config.entry_points import load_entry, with_installed
from megatron.config.schema import ModelConfig
from megatron.interop.families.family import HFFamily
from megatron.interop.families.gpt2 import GPT2
from megatron.interop.families.llama import LLAMA
from megatron.interop.families.megatron_bert import MEGATRON_BERT
from megatron.interop.families.mistral import MISTRAL

GROUP = "megatron.families"

OWN: Mapping[str, HFFamily] = MappingProxyType({family.model_type: family for family in (GPT2, LLAMA, MISTRAL, MEGATRON_BERT)})
FAMILIES: Mapping[str, HFFamily | EntryPoint] = with_installed(OWN, GROUP)
# Families that are known and cannot be read, each with the reason.
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "bert": "whose layer norms follow each layer; here they come first, as in 'megatron-bert', and weights of the one make "
        "no sense in the other"
    }
)


def family_named(model_type: str) -> HFFamily:
    """Return the family of a `model_type`. ValueError when it is not known, or its package does not hold what it should."""
    if model_type not in FAMILIES:
        if model_type in REFUSED:
            raise ValueError(f"`model_type` is {model_type!r}, {REFUSED[model_type]}")
        raise ValueError(f"`model_type` is {model_type!r}; known are {', '.join(sorted(FAMILIES))}")
    found = FAMILIES[model_type]
    if isinstance(found, HFFamily):
        return found
    try:
        family = load_entry(found)
    except ValueError as error:
        raise ValueError(f"the family {model_type} {error}") from error
    if not isinstance(family, HFFamily) or family.model_type != model_type:
        raise ValueError(f"the family {model_type} needs {found.value}, which is no HFFamily of this model_type")
    return family


def family_for_export(config: ModelConfig, model_type: str | None = None) -> HFFamily:
    """Return the family that a model is exported as: the one named, else the first in the table that can express it.

    Args:
        config: resolved.
        model_type: of the directory that the model was imported from, if any: several families can express one model.

    Raises:
        ValueError: with everything that stands in the way, when no family can express the model.
    """
    if model_type is not None and model_type in FAMILIES and (family := family_named(model_type)).expresses(config):
        return family
    reasons: dict[str, str] = {}
    for name in FAMILIES:
        family = family_named(name)
        if family.expresses(config):
            return family
        if family.exported and family.serves(config):
            reasons[family.exported_class(config).architecture] = ", ".join(family.unsupported(config))
    listed = "; ".join(f"{architecture} cannot express {why}" for architecture, why in reasons.items())
    raise ValueError(f"no Hugging Face family has this architecture: {listed}")
