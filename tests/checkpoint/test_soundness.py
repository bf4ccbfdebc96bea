"""Megatron-LM's files whose tensors are no weights, or whose copies and settings contradict one another."""

import pytest
import torch
from archives import build, named_weights, released_state, small_config, write_archive

from megatron.checkpoint.layout import CheckpointError
from megatron.interop.megatron_files import read_megatron
from megatron.interop.released_archives import model_from_archive, read_archive
from megatron.interop.released_kinds import GPT2_KIND

ARGS = dict(num_layers=4, hidden_size=32, ffn_hidden_size=80, num_attention_heads=4, max_position_embeddings=48)
UP = "layers.2.mlp.dense_h_to_4h.weight"


def run(root, args=None, **changes):
    """A directory of Megatron-LM's, of one rank, with the tensors of `changes` in its layers."""
    config = small_config()
    model = released_state(config, named_weights(build(config)), 3.0, 128, half=False)
    for name, change in changes.items():
        key = {"up": UP, "norm": "layers.1.input_layernorm.weight"}[name]
        model["language_model"]["transformer"][key] = change(model["language_model"]["transformer"][key])
    folder = root / "release" / "mp_rank_00"
    folder.mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("release\n")
    write_archive(folder / "model_optim_rng.pt", model, 3.0, {**ARGS, **(args or {})})
    return root


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(up=lambda t: t.to(torch.int8)), f"{UP} holds int8, which is not a dtype of trained weights"),
        (dict(norm=lambda t: t / 0), r"layers.1.input_layernorm.weight has values that are not finite"),
    ],
)
def test_tensors_that_are_no_weights(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words):
        read_megatron(run(tmp_path, **change), 127)


def test_a_matrix_of_zeros_is_told(tmp_path):
    found = read_megatron(run(tmp_path, up=torch.zeros_like, norm=torch.zeros_like), 127)
    assert [note for note in found.notes if "zeros" in note] == [
        "layers.2.mlp.up.weight is all zeros; was the model saved completely?"
    ]


def test_the_epsilon_under_its_newer_name(tmp_path):
    assert read_megatron(run(tmp_path / "new", {"norm_epsilon": 1e-3}), 127).config.layernorm_epsilon == 1e-3
    both = {"norm_epsilon": 1e-3, "layernorm_epsilon": 1e-5}
    with pytest.raises(CheckpointError, match=r"norm_epsilon 0.001 and layernorm_epsilon 1e-05"):
        read_megatron(run(tmp_path / "both", both), 127)


def test_a_copy_in_a_released_archive(tmp_path):
    """A released archive may hold a second copy of the tied matrix, for the output layer."""
    config = small_config()
    model = released_state(config, named_weights(build(config)), 3.0, 128, half=False)
    word = model["language_model"]["embedding"]["word_embeddings"]["weight"]
    model["word_embeddings_for_head"] = {"weight": word.clone()}
    archive = write_archive(tmp_path / "same.zip", model, 3.0, ARGS)
    model_from_archive(read_archive(archive), GPT2_KIND, None)
    model["word_embeddings_for_head"] = {"weight": word + 1}
    archive = write_archive(tmp_path / "other.zip", model, 3.0, ARGS)
    with pytest.raises(CheckpointError, match="copy of the word embeddings differs"):
        model_from_archive(read_archive(archive), GPT2_KIND, None)
