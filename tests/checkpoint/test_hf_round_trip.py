"""A Hugging Face directory, imported and exported again, is to transformers what it was: tokenizer, templates, settings."""

import json
import re
import runpy
import shutil
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch
from hf_directories import CHAT, SOURCES, bert_words_cased, byte_vocabulary, gpt2_added_tokens, gpt2_decoder, write_files

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.hugging_face_files import checkpoint_assets, inherited_assets, read_kept_files
from megatron.checkpoint.layout import CheckpointError, read_manifest
from megatron.checkpoint.save import save
from megatron.checkpoint.tokenizer import open_tokenizer
from megatron.cli.program import pretrain
from megatron.data.errors import DataError
from megatron.data.hugging_face import read_hf_tokenizer
from megatron.data.tokenizer import ByteTokenizer, NullTokenizer, load_tokenizer
from megatron.files.outputs import MARKER
from megatron.inference.restore import open_model
from megatron.interop import hf_tokenizers
from megatron.interop.checked_export import ExportError, _check_tokenizer
from megatron.interop.checked_import import write_imported
from megatron.interop.hf_tokenizers import import_tokenizer, tokenizer_difference
from megatron.interop.megatron_tensors import resize_vocabulary
from megatron.interop.side_files import read_side_files
from megatron.interop.whole_tensors import read_weights
from megatron.mesh.mesh import Mesh

transformers = pytest.importorskip("transformers")
TOOLS = Path(__file__).parents[2] / "tools"
MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "the fox"}]


def tool(monkeypatch, name, *arguments):
    """The tool's exit status."""
    argv = list(map(str, arguments))
    monkeypatch.setattr(sys, "argv", [name, *argv])
    main = runpy.run_path(str(TOOLS / name))["main"]
    return main(argv) if signature(main).parameters else main()


def transformers_tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def files(folder):
    """All but the mark of the tool that made the directory."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != MARKER}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for make in SOURCES:
        make(root / make.__name__)
    return root


@pytest.mark.parametrize("name", [make.__name__ for make in SOURCES])
def test_nothing_is_lost(sources, tmp_path, monkeypatch, name):
    source, out = sources / name, tmp_path / "hf"
    assert tool(monkeypatch, "import_hf.py", "--input", source, "--save", tmp_path / "ours") == 0
    assert tool(monkeypatch, "export_hf.py", "--load", tmp_path / "ours", "--output", out) == 0
    before, after = files(source), files(out)
    changed = {n for n, content in before.items() if after.get(n) != content} - {"config.json", "model.safetensors"}
    assert not changed and after.keys() - before.keys() <= {"generation_config.json"}
    ids = [{k: v for k, v in json.loads(f["config.json"]).items() if k.endswith("_token_id")} for f in (before, after)]
    assert ids[0] == ids[1] and ids[0]
    here, there = open_tokenizer(find_checkpoint(tmp_path / "ours")), transformers_tokenizer(source)
    assert tokenizer_difference(here, there) is None and tokenizer_difference(here, transformers_tokenizer(out)) is None
    assert (
        there.special_tokens_map == transformers_tokenizer(out).special_tokens_map
        and there.all_special_ids == transformers_tokenizer(out).all_special_ids
    )
    if there.chat_template:
        chats = [
            t.apply_chat_template(MESSAGES, tokenize=False, chat_template=c)
            for t in (there, transformers_tokenizer(out))
            for c in (None, CHAT)
        ]
        assert chats[0] == chats[2] and "the fox" in chats[0]


def test_ids_by_hand(sources, monkeypatch):
    """Added tokens are one token, special ones have their roles, and capitals stay where they should; all were lost once."""
    found = import_tokenizer(sources / "gpt2_added_tokens", print)
    assert found.tokenize("he<pad>a<sep>") == [256, 258, 97, 259] and found.special["pad"] == 258 and found.eod == 257
    cased, lower = (import_tokenizer(sources / n, print) for n in ("bert_words_cased", "bert_words"))
    assert (cased.tokenize("The É"), lower.tokenize("The É")) == ([12, 1], [5, 1])
    assert {role: cased.special[role] for role in ("pad", "cls", "sep", "mask")} == {"pad": 0, "cls": 2, "sep": 3, "mask": 4}
    said = []
    monkeypatch.setattr(hf_tokenizers, "find_spec", lambda name: None)
    for make in (gpt2_added_tokens, gpt2_decoder, bert_words_cased):  # the same without transformers
        assert (
            tokenizer_difference(
                import_tokenizer(sources / make.__name__, said.append), transformers_tokenizer(sources / make.__name__)
            )
            is None
        )
    assert said == ["the tokenizer was not compared with transformers', which is not installed"] * 3


def test_transformers_decides(sources, tmp_path, monkeypatch):
    """That of transformers is taken where ours gives other ids or cannot read it; where none gives the same ids, it is said."""
    source = sources / "gpt2_decoder"
    for other in (read_hf_tokenizer(sources / "bert_words"), None):
        monkeypatch.setattr(hf_tokenizers, "read_hf_tokenizer", lambda folder, other=other: other)
        assert tokenizer_difference(import_tokenizer(source, print), transformers_tokenizer(source)) is None
    monkeypatch.setattr(hf_tokenizers, "wrap_backend", lambda backend, roles: ByteTokenizer())
    with pytest.raises(
        DataError, match=r"not transformers': it has 257 tokens, transformers' 261; --no-tokenizer leaves it out"
    ):
        import_tokenizer(source, print)
    shutil.copytree(source, tmp_path / "bad")
    (tmp_path / "bad" / "vocab.json").write_text("{")
    with pytest.raises(DataError, match=r"transformers cannot open its tokenizer: .*--no-tokenizer imports the weights alone"):
        import_tokenizer(tmp_path / "bad", print)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.add_tokens(["zz"]), "it has 261 tokens, transformers' 262"),
        (lambda t: setattr(t, "pad_token", "<|end|>"), "the pad token is None, for transformers 259"),
        (
            lambda t: setattr(t._tokenizer, "normalizer", transformers.BertTokenizer()._tokenizer.normalizer),
            "' is .*, for transf",
        ),
    ],
)
def test_the_first_difference_of_two_tokenizers_is_named(sources, change, words):
    ours, other = import_tokenizer(sources / "gpt2_decoder", print), transformers_tokenizer(sources / "gpt2_decoder")
    change(other)
    assert re.search(words, tokenizer_difference(ours, other) or "nothing")


def test_the_export_compares_its_files_with_the_checkpoint(sources, tmp_path):
    """Files that transformers reads in another way give way to the checkpoint's own; without a way it is an error."""
    ours = import_tokenizer(sources / "gpt2_decoder", print)
    out = tmp_path / "out"
    shutil.copytree(sources / "gpt2_added_tokens", out)
    assert tokenizer_difference(ours, transformers_tokenizer(out)) is not None
    for name in ("added_tokens.json", "special_tokens_map.json"):
        (out / name).unlink()
    _check_tokenizer(out, ours)
    assert tokenizer_difference(ours, transformers_tokenizer(out)) is None
    write_files(out, tokenizer_config__json={"mask_token": "<mask>"})
    with pytest.raises(ExportError, match="the tokenizers disagree: it has 261 tokens, transformers' 262"):
        _check_tokenizer(out, ours)


def test_more_tokens_than_rows(sources, tmp_path, monkeypatch, capsys):
    source = sources / "llama_pad_beyond"
    assert tool(monkeypatch, "import_hf.py", "--input", source, "--save", tmp_path / "as it is") == 0
    assert "has 258 tokens, the model 257: there is no row for '<pad>', and a text with such" in capsys.readouterr().err
    assert tool(monkeypatch, "generate.py", "--load", tmp_path / "as it is", "--prompt", "a<pad>") == 2
    assert "token 257 of the prompt is outside of the vocabulary of 257" in capsys.readouterr().err
    assert tool(monkeypatch, "import_hf.py", "--input", source, "--save", tmp_path / "grown", "--vocab-size", "258") == 0
    assert "note" not in capsys.readouterr().err
    old, new = (read_weights(find_checkpoint(tmp_path / name)) for name in ("as it is", "grown"))
    for name in ("embedding.word.weight", "head.weight"):
        assert torch.equal(new[name][:257], old[name]) and torch.allclose(new[name][257], old[name].mean(dim=0), atol=1e-7)
    assert tool(monkeypatch, "export_hf.py", "--load", tmp_path / "grown", "--output", tmp_path / "hf") == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (
        config["vocab_size"] == 258
        and tokenizer_difference(open_model(tmp_path / "grown").tokenizer, transformers_tokenizer(tmp_path / "hf")) is None
    )


def test_a_round_trip_without_the_tokenizer_leaves_its_files_out(sources, tmp_path, monkeypatch, capsys):
    source = sources / "gpt2_added_tokens"
    assert tool(monkeypatch, "import_hf.py", "--input", source, "--save", tmp_path / "ours", "--no-tokenizer") == 0
    assert "note" not in capsys.readouterr().err and open_model(tmp_path / "ours").tokenizer is None
    assert tool(monkeypatch, "export_hf.py", "--load", tmp_path / "ours", "--output", tmp_path / "hf") == 0
    assert sorted(files(tmp_path / "hf")) == ["config.json", "generation_config.json", "model.safetensors"]
    assert files(tmp_path / "hf")["generation_config.json"] == (source / "generation_config.json").read_bytes()
    assert json.loads(files(tmp_path / "hf")["config.json"])["eos_token_id"] == [257, 258]


def test_rows_of_the_output_bias_grow_as_well():
    held = {"embedding.word.weight": torch.eye(3), "masked_words.bias": torch.tensor([1.0, 2.0, 6.0]), "x": torch.ones(3)}
    grown = resize_vocabulary(held, 5)
    assert grown["masked_words.bias"].tolist() == [1, 2, 6, 3, 3] and grown["x"] is held["x"]
    assert resize_vocabulary(held, 2)["embedding.word.weight"].shape == (2, 3)
    with pytest.raises(CheckpointError, match="a vocabulary of 0 tokens"):
        resize_vocabulary(held, 0)


def test_training_on_from_an_import(sources, tmp_path, monkeypatch, capsys):
    """Without --finetune it is said what is missing.

    With it, what came along goes from checkpoint to checkpoint; and nothing is imported into the run.
    """
    source, ours, run = sources / "gpt2_added_tokens", tmp_path / "ours", tmp_path / "run"
    assert tool(monkeypatch, "import_hf.py", "--input", source, "--save", ours) == 0
    (tmp_path / "text.jsonl").write_text('{"text": "hello <sep> the<pad>fox"}\n' * 40)
    words = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", ours / "iter_0000000" / "tokenizer"]
    prefix = tmp_path / "text"
    made = tool(
        monkeypatch, "preprocess_data.py", "--input", f"{prefix}.jsonl", "--output-prefix", prefix, *words, "--append-eod"
    )
    assert made == 0
    about = f"--use-checkpoint-args --load {ours} --data-path {prefix}_text_document --split 1,0,0 --seq-length 16 --lr 1e-3 "
    about += "--micro-batch-size 1 --global-batch-size 1 --eval-iters 0 --save-interval 1 --auto-resume --finetune"

    def train(iterations, save, leave_out=()):
        flags = [f for f in about.split() if f not in leave_out]
        argv = [*flags, *map(str, words), "--train-iters", str(iterations), "--save", str(save), "--lr-decay-style", "constant"]
        return pretrain(argv, program="pretrain_gpt.py", defaults={})

    capsys.readouterr()
    for target, auto in ((run, "--auto-resume"), (ours, "")):  # --load names it, --auto-resume finds it
        assert train(1, target, ("--finetune", auto)) == 2
        err = capsys.readouterr().err
        assert f"the checkpoint {ours}/iter_0000000 contains weights only" in err
        assert f"--load {ours} --finetune" in err and "Traceback" not in err
    for iterations in (1, 2):  # the second goes on from the first
        assert train(iterations, run) == 0
        assert f"loading checkpoint {(ours, run)[iterations - 1]}/iter_000000{iterations - 1}" in capsys.readouterr().out
        folder = run / f"iter_000000{iterations}" / "tokenizer" / "hugging_face"
        want = read_side_files(source, tokenizer=True)
        assert files(folder) == want and len(want) == 7
    assert tool(monkeypatch, "export_hf.py", "--load", run, "--output", tmp_path / "hf") == 0
    assert all(files(tmp_path / "hf")[name] == data for name, data in want.items() if name != "config.json")
    capsys.readouterr()
    for name, more in (("import_hf.py", ("--input", source)), ("export_megatron.py", ("--load", ours))):
        assert tool(monkeypatch, name, *more, "--save", run) == 2
        assert f"--save {run} holds checkpoints" in capsys.readouterr().err and find_checkpoint(run).name == "iter_0000002"
    assert tool(monkeypatch, "import_hf.py", "--input", source, "--save", ours) == 0  # again is no harm
    # A run that saves where its import lies starts from it, too.
    assert train(1, ours) == 0 and find_checkpoint(ours).name == "iter_0000001"


def test_another_tokenizer_does_not_carry_the_files(sources, tmp_path):
    source, said = sources / "gpt2_added_tokens", []
    tokenizer = import_tokenizer(source, print)
    own = checkpoint_assets(tokenizer, read_side_files(source, tokenizer=True))
    directory = save(tmp_path / "run", 1, {}, Mesh.single(), config={}, assets=own)
    assert inherited_assets(load_tokenizer(directory / "tokenizer"), directory, said.append) == own
    assert not said
    size = byte_vocabulary(tmp_path, ("<pad>", "<sep>"))
    other = read_hf_tokenizer(tmp_path)
    assert other.vocab_size == size == tokenizer.vocab_size  # as many tokens, but in text `<pad>` is none
    left = inherited_assets(other, directory, said.append)
    assert not any(name.startswith("hugging_face") for name in left)
    assert len(said) == 1 and "are of another tokenizer and are not kept on: added_tokens.json, config.json, gener" in said[0]
    directory = save(tmp_path / "bad", 1, {}, Mesh.single(), config={}, assets={"hugging_face/model.safetensors": b"x"})
    assert "tokenizer/hugging_face/model.safetensors" in read_manifest(directory).files
    with pytest.raises(CheckpointError, match="nothing of that name is kept"):
        read_kept_files(directory)


def test_end_tokens_of_another_tokenizer_do_not_go_on(tmp_path):
    """After an import without its tokenizer, the end token alone says whether the run's tokenizer is the same."""
    for iteration, (ends, tokenizer, stay) in enumerate(
        [
            ([5, 256], ByteTokenizer(), True),
            (256, ByteTokenizer(), True),
            (None, ByteTokenizer(), True),
            ([5, 6], ByteTokenizer(), False),
            (5, ByteTokenizer(), False),
            (5, NullTokenizer(257), True),
        ]
    ):
        content, said = json.dumps({"eos_token_id": ends}).encode(), []
        directory = save(tmp_path, iteration, {}, Mesh.single(), config={}, assets={"hugging_face/config.json": content})
        assert ("hugging_face/config.json" in inherited_assets(tokenizer, directory, said.append)) == stay
        assert ["are of another tokenizer and are not kept on: config.json" in line for line in said] == [True] * (not stay)


def test_settings_of_generation_in_an_old_config(sources, tmp_path, monkeypatch):
    """Before generation_config.json they stood in config.json; transformers finds them after the round trip as before."""
    source = tmp_path / "old"
    shutil.copytree(sources / "gpt2_added_tokens", source)
    (source / "generation_config.json").unlink()
    settings = {"do_sample": True, "temperature": 0.7, "max_length": 31, "bad_words_ids": [[3, 4]]}
    write_files(source, config__json={**json.loads((source / "config.json").read_text()), **settings})
    assert tool(monkeypatch, "import_hf.py", "--input", source, "--save", tmp_path / "ours") == 0
    assert tool(monkeypatch, "export_hf.py", "--load", tmp_path / "ours", "--output", tmp_path / "hf") == 0
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config for folder in (source, tmp_path / "hf")
    )
    assert all(getattr(after, name) == value for name, value in settings.items())
    ignored = {"_from_model_config": None, "use_cache": None, "transformers_version": None}
    assert before.to_diff_dict() | ignored == after.to_diff_dict() | ignored


def test_fewer_rows_than_tokens_are_exported_and_absurd_sizes_refused(sources, tmp_path, monkeypatch, capsys):
    """Fewer rows than tokens can be exported; what no machine holds is refused before anything is made of it."""
    source = ("--input", sources / "gpt2_added_tokens")
    assert tool(monkeypatch, "import_hf.py", *source, "--save", tmp_path / "ours", "--vocab-size", 100) == 0
    assert tool(monkeypatch, "export_hf.py", "--load", tmp_path / "ours", "--output", tmp_path / "hf") == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 100
    assert tool(monkeypatch, "import_hf.py", *source, "--save", tmp_path / "no", "--vocab-size", 10**14) == 2
    assert "a vocabulary of 100,000,000,000,000 tokens, which makes no sense" in capsys.readouterr().err
    for number, words in ((17_000_000, "the id of a token is 17,000,000, which makes no sense"), (256, "tokenizer")):
        shutil.copytree(source[1], folder := tmp_path / f"id {number}")
        vocab = json.loads((folder / "vocab.json").read_text())
        write_files(folder, vocab__json={**vocab, "zz": number})
        assert tool(monkeypatch, "import_hf.py", "--input", folder, "--save", tmp_path / "no") == 2
        err = capsys.readouterr().err
        assert f"{folder}: " in err and words in err and "--no-tokenizer" in err and "/tokenizer.json" not in err


def test_an_import_hides_no_checkpoint(tmp_path):
    from archives import build, named_weights, small_config

    config = small_config()
    weights = named_weights(build(config))
    write_imported(tmp_path, config, weights, iteration=5)
    write_imported(tmp_path, config, weights, iteration=5)
    for iteration in (0, 6):  # a winding back, and a later one that would hide what is there
        with pytest.raises(
            CheckpointError, match=f"holds checkpoints already, of iteration 5: one of iteration {iteration} there"
        ):
            write_imported(tmp_path, config, weights, iteration=iteration)
