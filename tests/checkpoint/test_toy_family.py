"""A family that another package brings in one file: from a directory in its form to training on several ranks, and back."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

import hf_models  # noqa: E402
import toy_families  # noqa: E402
from hf_directories import write_files  # noqa: E402
from installed import install  # noqa: E402
from models import LLAMA, list_family, with_rows  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from source_files import ROOT  # noqa: E402
from test_hf_compared import save_untrained_model  # noqa: E402
from toy_families import TOY_LLAMA  # noqa: E402

from megatron.checkpoint.find import find_checkpoint  # noqa: E402
from megatron.checkpoint.hugging_face_files import read_kept_files  # noqa: E402
from megatron.checkpoint.layout import CheckpointError  # noqa: E402
from megatron.config.schema import ModelConfig  # noqa: E402
from megatron.data.tokenizer import ByteTokenizer  # noqa: E402
from megatron.interop.checked_export import ExportError, export_hf  # noqa: E402
from megatron.interop.checked_import import write_imported  # noqa: E402
from megatron.interop.families.llama import LLAMA as LLAMA_FAMILY  # noqa: E402
from megatron.interop.families.table import family_for_export  # noqa: E402
from megatron.interop.hf_import import read_hf  # noqa: E402
from megatron.interop.whole_tensors import read_weights  # noqa: E402

NO_CLASS = "transformers has no ToyLlamaForCausalLM"
# What the toy calls the fields of a Llama's config.json.
FIELDS = {
    "vocab_size": "vocab_size", "hidden_size": "width", "intermediate_size": "inner_width", "num_hidden_layers": "depth",
    "num_attention_heads": "heads", "num_key_value_heads": "shared_heads", "head_dim": "head_width",
    "max_position_embeddings": "longest", "rms_norm_eps": "epsilon", "attention_dropout": "dropout",
    "initializer_range": "initializer_range", "tie_word_embeddings": "tie_word_embeddings",
}  # fmt: skip
TENSORS = {
    "embed_tokens.weight": "tokens.matrix", "input_layernorm.weight": "before_attention.scale", "o_proj.weight": "out",
    "post_attention_layernorm.weight": "before_mlp.scale", "gate_proj.weight": "opens", "up_proj.weight": "wide",
    "down_proj.weight": "narrow", "model.norm.weight": "toy.last.scale", "lm_head.weight": "words.matrix", "model.": "toy.",
    ".layers.": ".blocks.", ".self_attn.": ".attention.",
}  # fmt: skip


def renamed(name: str) -> str:
    for theirs, toy in TENSORS.items():
        name = name.replace(theirs, toy)
    return name


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Path, Path]:
    """A Llama that transformers wrote, with a tokenizer; and the same model by hand in the toy's form."""
    root = tmp_path_factory.mktemp("sources")
    llama, toy = root / "llama", root / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hf_models.LLAMA, "vocab_size", 257)
        patch.setitem(hf_models.MODELS, "llama", ("LlamaForCausalLM", "LlamaConfig", hf_models.LLAMA))
        about = hf_models.write_hf_directory("llama", llama)
    tensors = load_file(llama / "model.safetensors")
    for n in range(about["num_hidden_layers"]):
        parts = [tensors.pop(f"model.layers.{n}.self_attn.{x}_proj.weight") for x in "qkv"]
        tensors[f"toy.blocks.{n}.attention.stacked"] = torch.cat(parts)
    toy.mkdir()
    save_file({renamed(name): tensor for name, tensor in tensors.items()}, toy / "model.safetensors", {"format": "pt"})
    own = {FIELDS[name]: value for name, value in about.items() if name in FIELDS}
    ids = {name: value for name, value in about.items() if name.endswith("_token_id")}
    write_files(
        toy, config__json={"architectures": ["ToyLlamaForCausalLM"], "model_type": "toy_llama", **own, "base": 500.0, **ids}
    )
    for folder in (llama, toy):
        ByteTokenizer().backend().save(str(folder / "tokenizer.json"))
        write_files(folder, tokenizer_config__json={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    return llama, toy


@pytest.fixture
def listed(monkeypatch) -> None:
    """As it is where the package is installed."""
    list_family(monkeypatch, TOY_LLAMA)


def tool(monkeypatch, name: str, *arguments: object) -> int:
    argv = [*map(str, arguments)]
    monkeypatch.setattr(sys, "argv", [name, *argv])
    main = runpy.run_path(str(ROOT / "tools" / name))["main"]
    return main(argv) if signature(main).parameters else main()


def train(load: Path, save: Path, ranks: int, *flags: str) -> list[float]:
    """The losses of two steps of pretrain_gpt.py from a checkpoint, on that many ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        job = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": s.getsockname()[1]}
    words = (
        f"--load {load} --finetune --use-checkpoint-args --mock-data --seq-length 16 --micro-batch-size 2 --global-batch-size 4"
    )
    words += (
        f" --train-iters 2 --lr 1e-2 --lr-decay-style constant --eval-iters 0 --log-interval 1 --save {save} --save-interval 2"
    )
    command = [os.environ["WARM_PYTHON"], str(ROOT / "pretrain_gpt.py"), *words.split(), "--attention-dropout", "0", *flags]
    started = []
    for rank in range(ranks):
        place = {name: str(value) for name, value in {**job, "RANK": rank, "LOCAL_RANK": rank}.items()}
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **place}))
    said = [process.communicate(timeout=200)[1] for process in started]
    assert [process.returncode for process in started] == [0] * ranks, said
    return [json.loads(line)["lm_loss"] for line in (save / "metrics.jsonl").read_text().splitlines()]


def test_the_toy_says_what_the_llama_says(sources, listed) -> None:
    """The same configuration and weights, from names and fields of which few are the same."""
    (config, weights), (expected, llama) = (read_hf(folder) for folder in reversed(sources))
    assert config == expected and weights.keys() == llama.keys()
    assert all(torch.equal(weights[name], llama[name]) for name in llama)
    theirs, toy = (load_file(folder / "model.safetensors").keys() for folder in sources)
    assert not theirs & toy


def test_from_the_toy_to_four_ranks_and_back(sources, listed, tmp_path, monkeypatch, capsys) -> None:
    source = sources[1]
    assert tool(monkeypatch, "import_hf.py", "--input", source, "--save", tmp_path / "ours") == 0
    assert f"not compared with transformers' logits: {NO_CLASS}" in capsys.readouterr().out
    assert tool(monkeypatch, "export_hf.py", "--load", tmp_path / "ours", "--output", tmp_path / "hf") == 0
    said = capsys.readouterr().out
    assert f"{NO_CLASS}, so no logits are compared; read back here, all 17 tensors equal the checkpoint's" in said
    assert "hidden states differ by at most 0.00e+00" in said
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "hf"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    about, again = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "hf"))
    assert about.items() <= again.items()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()

    alone = train(tmp_path / "ours", tmp_path / "alone", 1)
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"
    several = train(tmp_path / "ours", tmp_path / "several", 4, *layout.split())
    assert len(alone) == 2 and several == pytest.approx(alone, rel=1e-5) and alone[0] != alone[1]
    assert tool(monkeypatch, "export_hf.py", "--load", tmp_path / "several", "--output", tmp_path / "trained") == 0
    assert NO_CLASS in capsys.readouterr().out
    config, weights = read_hf(tmp_path / "trained")
    held = read_weights(find_checkpoint(tmp_path / "several"))
    assert held.keys() == weights.keys() and all(held[name].equal(weights[name]) for name in held)
    assert (config.rotary_base, config.layernorm_epsilon, config.num_query_groups) == (500.0, 3e-3, 2)
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    assert trained.keys() == before.keys() and not any(trained[name].equal(before[name]) for name in before)


def test_a_model_goes_back_to_the_family_that_it_came_from(sources, listed, tmp_path) -> None:
    """The first family in the table that can is taken where none was named, and for a model that the toy cannot express."""
    model = ModelConfig(**LLAMA)
    assert family_for_export(model) is LLAMA_FAMILY is family_for_export(model, "llama") is family_for_export(model, "mistral")
    assert family_for_export(model, "toy_llama") is TOY_LLAMA
    assert (
        family_for_export(replace(model, add_bias_linear=True), "toy_llama")
        is LLAMA_FAMILY
        is family_for_export(model, "unknown")
    )
    for source, kind in zip(sources, ("llama", "toy_llama"), strict=True):
        config, weights = read_hf(source)
        kept = {"config.json": (source / "config.json").read_bytes()}
        made = write_imported(tmp_path / kind / "run", config, weights, kept=kept)
        assert read_kept_files(made) == kept
        export_hf(tmp_path / kind / "run", tmp_path / kind / "hf", say=lambda line: None)
        assert json.loads((tmp_path / kind / "hf" / "config.json").read_text())["model_type"] == kind
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot express --norm.*; ToyLlamaForCausalLM cannot express"):
        family_for_export(replace(model, normalization="LayerNorm"))


def test_a_hidden_dropout_is_named(listed, tmp_path) -> None:
    kept = {"config.json": b'{"model_type": "toy_llama"}'}
    config = ModelConfig(**LLAMA)
    save_untrained_model(tmp_path / "fresh", LLAMA)
    write_imported(tmp_path / "run", config, read_weights(find_checkpoint(tmp_path / "fresh")), kept=kept)
    said: list[str] = []
    export_hf(tmp_path / "run", tmp_path / "hf", say=said.append)
    assert "a toy has no hidden dropout, so 0.1 is not written" in said


def with_conversion(ours: str, **changes):
    rows = TOY_LLAMA.classes[0].templates
    return with_rows(
        TOY_LLAMA, tuple(replace(r, conversion=replace(r.conversion, **changes)) if r.native == ours else r for r in rows)
    )


def with_field(**changes):
    return replace(TOY_LLAMA, to_fields=lambda model: {**toy_families.to_fields(model), **changes})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            with_conversion("layers.{n}.mlp.up.weight", from_hf=lambda tensors, config: -tensors[0]),
            "layers.0.mlp.up.weight is another",
        ),
        (
            with_conversion("layers.{n}.attention.qkv.weight", from_hf=lambda tensors, config: tensors[0]),
            "qkv.weight is another tensor",
        ),
        (with_field(epsilon=1e-5), "config.json says layernorm_epsilon 1e-05, the checkpoint 0.003"),
        (with_field(base=400.0), "read back, its hidden states differ by"),
        (with_field(inner_width=41), "it cannot be read back"),
    ],
)
def test_directions_that_do_not_belong_together_fail_the_export(sources, listed, tmp_path, monkeypatch, wrong, words) -> None:
    """Without transformers' logits, reading back must tell."""
    source = sources[1]
    kept = {"config.json": (source / "config.json").read_bytes()}
    write_imported(tmp_path / "run", *read_hf(source), kept=kept)
    list_family(monkeypatch, wrong)
    with pytest.raises(ExportError, match=words):
        export_hf(tmp_path / "run", tmp_path / "hf", say=lambda line: None)
    assert not (tmp_path / "hf").exists() and (tmp_path / "hf.failed").exists()


def test_an_installed_package_brings_a_family(sources, tmp_path) -> None:
    """By its entry point alone; what cannot be loaded is said in a line."""
    gone, wrong = "gone = toy_families_of_old:TOY", "wrong = toy_families:TOY_LLAMA"
    known = ("toy_llama = toy_families:TOY_LLAMA", gone, wrong, "gpt2 = toy_families:TOY_LLAMA")
    environment = install(tmp_path / "site", toy_families, "megatron.families", known)

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = run("import_hf.py", "--input", sources[1], "--save", tmp_path / "ours")
    assert done.returncode == 0 and NO_CLASS in done.stdout, done.stderr
    done = run("export_hf.py", "--load", tmp_path / "ours", "--output", tmp_path / "hf")
    assert done.returncode == 0 and NO_CLASS in done.stdout, done.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (sources[1], tmp_path / "hf"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    code = (
        "import sys; from pathlib import Path; from megatron.interop.families.table import BUILT_IN, FAMILIES, family_named\n"
        "assert FAMILIES['gpt2'] is BUILT_IN['gpt2'] and 'toy_families' not in sys.modules\n"
        "for name in ('gone', 'wrong', 'other'):\n"
        "    try: family_named(name)\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    gone, wrong, other = done.stdout.splitlines()
    assert gone.startswith("the family gone needs toy_families_of_old:TOY, which cannot be loaded: No module named")
    assert wrong == "the family wrong needs toy_families:TOY_LLAMA, which is not an HFFamily of this model_type"
    assert other.startswith("`model_type` is 'other'; known are gone, gpt2, llama, megatron-bert, mistral, toy_llama, wrong")


def test_without_the_package_it_is_refused(sources) -> None:
    with pytest.raises(CheckpointError, match="toy: `model_type` is 'toy_llama'; known are gpt2, llama, "):
        read_hf(sources[1])
