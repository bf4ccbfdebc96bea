"""The tables of names, in both directions."""

import pytest
import torch
from models import BASE, BERT, build
from models import LLAMA as LLAMA_SETTINGS

from megatron.checkpoint.weights import ModuleWeights
from megatron.config.schema import ModelConfig
from megatron.interop.families.gpt2 import GPT2
from megatron.interop.families.llama import LLAMA
from megatron.interop.families.megatron_bert import MEGATRON_BERT, WITH_ORDER, WORDS_ALONE
from megatron.interop.families.table import family_for_export
from megatron.interop.tensor_mapping import join_qkv, split_qkv
from megatron.mesh.mesh import Axis


def test_qkv_rows_are_what_the_layer_says():
    """Row (group, slot, channel) holds that number: queries of the group, then its key, then its value."""
    config = ModelConfig(**{**BASE, "num_query_groups": 2})
    rows = torch.tensor([[g, s, d] for g in range(2) for s in range(4) for d in range(8)])
    q, k, v = split_qkv(rows, config)
    assert q.tolist() == [[g, s, d] for g in range(2) for s in range(2) for d in range(8)]
    assert k.tolist() == [[g, 2, d] for g in range(2) for d in range(8)]
    assert v.tolist() == [[g, 3, d] for g in range(2) for d in range(8)]
    assert torch.equal(join_qkv((q, k, v), config), rows)


@pytest.mark.parametrize(
    "settings",
    [
        BASE,
        {**BASE, "apply_layernorm_1p": True},
        LLAMA_SETTINGS,
        {**LLAMA_SETTINGS, "num_query_groups": 2, "add_bias_linear": True},
        BERT,
        {**BERT, "bert_binary_head": False, "apply_layernorm_1p": True},
    ],
)
def test_reading_undoes_writing(settings):
    config = ModelConfig(**settings)
    family = family_for_export(config)
    weights = {s.name: s.data for s in ModuleWeights(build(config, Axis.alone("tp"))).shards()}
    rows = {row.native: row for row in family.mappings(config)}
    theirs = set()
    for name, tensor in weights.items():
        written = rows[name].conversion.to_hf(tensor, config)
        assert len(written) == len(rows[name].hf)
        theirs |= set(rows[name].hf)
        torch.testing.assert_close(rows[name].conversion.from_hf(written, config), tensor, rtol=0, atol=1e-6)
    assert len(theirs) == sum(len(rows[n].hf) for n in weights), "two of our tensors became the same one"
    for name, value in family.rounded(weights, config, torch.bfloat16).items():
        torch.testing.assert_close(value, weights[name], rtol=0.01, atol=0.01)
        assert not torch.equal(value, weights[name])


def test_the_family_follows_from_the_configuration():
    assert family_for_export(ModelConfig(**BASE)) is GPT2
    assert family_for_export(ModelConfig(**LLAMA_SETTINGS)) is LLAMA
    for more, written_as in ({}, WITH_ORDER), (dict(bert_binary_head=False), WORDS_ALONE):
        config = ModelConfig(**BERT, **more)
        assert family_for_export(config) is MEGATRON_BERT and MEGATRON_BERT.exported_class(config) is written_as


@pytest.mark.parametrize(
    ("change", "gpt2", "llama"),
    [
        (dict(position_embedding_type="rope"), "learned positions", "normalization LayerNorm"),
        (dict(num_query_groups=2), "num-query-groups 2", "rope"),
        (dict(kv_channels=16), "kv-channels 16", "the activation gelu"),
        (dict(activation="swiglu"), "no gate", "position-embedding-type learned_absolute"),
        (dict(LLAMA_SETTINGS, rotary_percent=0.5), "normalization RMSNorm", "rotary-percent 0.5"),
        (dict(LLAMA_SETTINGS, rotary_interleaved=True), "normalization RMSNorm", "rotary-interleaved"),
        (dict(LLAMA_SETTINGS, num_attention_heads=5, num_query_groups=5), "learned positions", "multiple of the 5 heads"),
        (dict(apply_residual_connection_post_layernorm=True), "residual", "residual"),
    ],
)
def test_what_no_family_can_express_is_listed(change, gpt2, llama):
    with pytest.raises(ValueError, match="no Hugging Face family has this architecture") as failure:
        family_for_export(ModelConfig(**{**BASE, **change}))
    first, second = str(failure.value).split("; Llama")
    assert gpt2 in first and llama in second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(position_embedding_type="rope"), "MegatronBertForPreTraining cannot express --position-embedding-type rope"),
        (
            dict(bert_binary_head=False, activation="swiglu"),
            "MegatronBertForMaskedLM cannot express --swiglu: its MLP has no gate",
        ),
    ],
)
def test_what_megatron_bert_cannot_express_is_listed(change, message):
    """The families of GPT are not mentioned."""
    with pytest.raises(ValueError, match=f"this architecture: {message}"):
        family_for_export(ModelConfig(**{**BERT, **change}))


def test_a_module_gives_its_parameters_without_padding_and_gets_zeros_there():
    model = build(ModelConfig(**BASE), Axis.alone("tp"))
    weights, word = ModuleWeights(model), model.embedding.word.weight
    before = word.detach().clone()
    with torch.no_grad():
        word[127] = 9.0
    shard = next(s for s in weights.shards() if s.name == "embedding.word.weight")
    assert word.shape == (128, 32) and shard.data.shape == shard.part.shape == shard.shape == (127, 32)
    assert shard.data.data_ptr() == word.data_ptr(), "a view of the live state"
    weights.load_scalars({})
    assert not word[127].any() and torch.equal(word[:127], before[:127])
