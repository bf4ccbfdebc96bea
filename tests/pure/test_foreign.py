"""Files and directories of other programs, by what lies in them: each is named, and ours are not taken for one of them."""

from __future__ import annotations

import bz2
import json
from pathlib import Path

import pytest

from megatron.files.foreign import recognize, recognize_bytes, recognize_directory, recognize_hub_name

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HF = {"config.json": json.dumps({"model_type": "gpt2"})}
OURS = {f"iter_0000004/{name}": "{}" for name in ("manifest.json", "state.json", "config.json", "shard_00000.safetensors")}
FORMS = {  # what lies in a directory, what it is called, what is to be done
    "torch_dist": (
        [
            "iter_0000100/__0_0.distcp",
            "iter_0000100/common.pt",
            "iter_0000100/metadata.json",
            "latest_checkpointed_iteration.txt",
        ],
        "a distributed checkpoint of Megatron-Core (torch_dist)",
        "--ckpt-format torch",
    ),
    "torch_dist of one iteration": (["__0_0.distcp", "common.pt", "metadata.json"], "of Megatron-Core (torch_dist)", "--ckpt-"),
    "torchtitan": (["step-100/__0_0.distcp", "step-100/.metadata"], "a distributed checkpoint of PyTorch", "import_hf.py"),
    "Megatron-LM": (
        ["iter_0000100/mp_rank_00/model_optim_rng.pt", "latest_checkpointed_iteration.txt"],
        "a checkpoint of Megatron-LM",
        "python tools/import_megatron.py --load DIR --save CKPT",
    ),
    "Megatron-LM's release": (["release/mp_rank_00/model_optim_rng.pt"], "a checkpoint of Megatron-LM", "import_megatron.py"),
    "Megatron-LM's stage": (["mp_rank_00_001/model_optim_rng.pt"], "a checkpoint of Megatron-LM", "import_megatron.py"),
    "DeepSpeed": (["global_step100/mp_rank_00_model_states.pt", "latest"], "a checkpoint of DeepSpeed", "zero_to_fp32.py"),
    "DeepSpeed's step": (["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "a checkpoint of DeepSpeed", "import_hf.py"),
    "Hugging Face": (HF | {"model.safetensors": "x"}, "a Hugging Face directory", "import_hf.py --input DIR --save CKPT"),
    "shards": (HF | {"model-00001-of-00002.safetensors": "x"}, "a Hugging Face directory", "import_hf.py --input DIR"),
    "config alone": (HF, "a Hugging Face directory", "import_hf.py --input DIR"),
    "pickles": (HF | {"pytorch_model.bin": "x"}, "without safetensors (pytorch_model.bin, a pickle)", "save_pretrained"),
    "a pointer": (HF | {"model.safetensors": LFS}, "whose model.safetensors is a pointer of Git LFS", "git lfs pull"),
    "the hub's cache": (["snapshots/abc/config.json"], "a directory of the Hugging Face hub's cache", "snapshots/abc"),
    "the Trainer": (
        ["checkpoint-500/config.json"],
        "a directory of the Hugging Face Trainer",
        "the latest model is in DIR/checkpoint-500",
    ),
    "PEFT": (["adapter_config.json", "adapter_model.safetensors"], "a PEFT adapter", "merge_and_unload"),
    "nanoGPT": (["ckpt.pt"], "a directory with ckpt.pt, which another program wrote", "import_hf.py"),
}


def write_content(folder: Path, content: list[str] | dict[str, str]) -> Path:
    for name in content:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content[name] if isinstance(content, dict) else "x")
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_directory_is_named_as_what_it_is(form: str, tmp_path: Path) -> None:
    content, what, advice = FORMS[form]
    found = recognize(write_content(tmp_path, content))
    assert found is not None and what in found.what, found
    assert advice.replace("DIR", str(tmp_path)) in found.advice, found


def test_what_is_ours_or_nobodys_is_not(tmp_path: Path) -> None:
    for name, content in {"ours": OURS, "unfinished": ["iter_0000004/config.json"], "notes": ["readme.md"], "none": []}.items():
        (tmp_path / name).mkdir()
        assert recognize(write_content(tmp_path / name, content)) is None, name
    assert recognize(tmp_path / "nothing") is None


def test_each_reader_names_what_another_one_reads(tmp_path: Path) -> None:
    for name, content in {"ours": OURS, "hf": FORMS["Hugging Face"][0], "lm": FORMS["Megatron-LM"][0]}.items():
        write_content(tmp_path / name, content)
    seen = {
        (name, reader): getattr(recognize_directory(tmp_path / name, reader), "what", None)
        for name in ("ours", "hf", "lm")
        for reader in ("native", "Hugging Face", "Megatron-LM")
    }
    own, hf, lm = (
        "a checkpoint of this program, which needs no import",
        "a Hugging Face directory",
        "a checkpoint of Megatron-LM",
    )
    assert seen == {
        ("ours", "native"): None, ("ours", "Hugging Face"): own, ("ours", "Megatron-LM"): own,
        ("hf", "native"): hf, ("hf", "Hugging Face"): None, ("hf", "Megatron-LM"): hf,
        ("lm", "native"): lm, ("lm", "Hugging Face"): lm, ("lm", "Megatron-LM"): None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("gpt2", "gpt2"), ("gpt2-medium", "gpt2-medium"), ("bert-base-uncased", "bert-base-uncased"),
        ("meta-llama/Llama-3-8B", "meta-llama/Llama-3-8B"), ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("https://huggingface.co/openai-community/gpt2/tree/main", "openai-community/gpt2"), ("hf://a/b", "a/b"),
        ("runs/gpt", None), ("checkpoints/llama", None), ("./gpt", None), ("../a/b", None), ("/data/gpt2", None), 
        ("a/b/c", None),        ("my run", None), ("corpus", None), ("here/gpt2", None), ("~/gpt2", None),
    ],
)  # fmt: skip
def test_names_on_the_hub_are_recognized(name: str, model: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    found = recognize_hub_name(name)
    assert (found is None) == (model is None)
    if found is not None:
        assert found.what == "a name on the Hugging Face hub, from which nothing is downloaded"
        assert found.advice == f"`huggingface-cli download {model} --local-dir DIR`, then give DIR"
        Path(name).mkdir(parents=True)
        assert recognize_hub_name(name) is None or "://" in name  # it is there


def test_files_by_their_first_bytes(tmp_path: Path) -> None:
    for head, what in (
        (LFS.encode(), "Git LFS"), (b"\x1f\x8b\x08", "gzip"), (b"\x28\xb5\x2f\xfd", "zstandard"), (bz2.compress(b"a"), "bzip2"),
        (b"\xfd7zXZ\x00", "xz"), (b"PK\x03\x04", "zip"), (b"PAR1\x15\x04", "Parquet"), (b"GGUF\x03\x00", "GGUF"),
        ("a b".encode("utf-16"), "UTF-16"), ("a b".encode("utf-16-be"), "UTF-16"), ("a b".encode("utf-16-le"), "UTF-16"),
        ("a b".encode("utf-32"), "UTF-32"), (bytes(257) + b"ustar", "tar"), (b"ab\x00\x00\x00", "not text"),
    ):  # fmt: skip
        found = recognize_bytes(head)
        assert found is not None and what in found.what, head
    for head in (
        b"",
        b"text",
        b"PAR1 and ORC",
        b"GGUF is a format",
        b"BZh9 is a mark",
        b"a" * 257 + b"ustar",
        b"\xef\xbb\xbftext",
        b'{"a": 1}',
    ):
        assert recognize_bytes(head) is None, head
    (tmp_path / "model.safetensors").write_text(LFS)
    assert "git lfs pull" in str(recognize(tmp_path / "model.safetensors"))
