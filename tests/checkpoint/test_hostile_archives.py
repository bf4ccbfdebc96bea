"""Archives, tensors and configurations made to fill the memory, to wait or to overflow: words, before anything is unpacked."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron.checkpoint.layout import CheckpointError
from megatron.interop.hf_import import read_hf
from megatron.interop.megatron_files import args_in_file, layer_sizes_from_args
from megatron.interop.released_archives import ARCHIVE_MEMBER, read_archive
from megatron.interop.safe_pickle import read_pickled

ROOT = Path(__file__).parents[2]
MB = 1 << 20


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_archive(path)
    assert path.name in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def write_zip(path: Path, size: int, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive, archive.open(ARCHIVE_MEMBER, "w", force_zip64=True) as member:
        for _ in range(size // MB):
            member.write(bytes(MB))
    return path


def save_pickled(path: Path, value: Any) -> Path:
    torch.save({"model": value}, path)
    return path


def test_an_archive_that_would_fill_the_memory_is_never_unpacked(tmp_path: Path) -> None:
    """The whole command, in a process whose memory is measured: 256 MB would be unpacked from 256 kB."""
    path = write_zip(tmp_path / "bomb.zip", 256 * MB)
    assert path.stat().st_size < MB // 2
    code = (
        "import resource, sys, torch, megatron.interop.convert_released as c, megatron.interop.released_kinds as r\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "status = c.main(r.GPT2_KIND, None, [sys.argv[1]])\n"
        "print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, cwd=ROOT)
    status, more = done.stdout.split()[-2:]
    assert status == "2" and "would unpack from" in done.stderr and done.stderr.count("\n") == 1
    assert int(more) < 50_000  # kB
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bomb.zip"]


def test_an_archive_that_says_it_is_smaller_is_damaged(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "lie.zip", 24 * MB)
    data = path.read_bytes()
    assert struct.pack("<Q", 24 * MB) in data or struct.pack("<I", 24 * MB) in data
    for form in ("<Q", "<I"):
        data = data.replace(struct.pack(form, 24 * MB), struct.pack(form, MB))
    path.write_bytes(data)
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_whose_unpacking_cannot_be_bounded(tmp_path: Path, method: int) -> None:
    assert f"packed by method {method}" in refusal(write_zip(tmp_path / "other.zip", MB, method))


def test_a_file_of_torch_whose_parts_are_packed(tmp_path: Path) -> None:
    plain = zipfile.ZipFile(save_pickled(tmp_path / "plain.pt", {"a": torch.zeros(MB)}))
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    assert "it is compressed" in refusal(tmp_path / "packed.pt")
    with zipfile.ZipFile(tmp_path / "both.zip", "w") as archive:  # and the same within an archive
        archive.write(tmp_path / "packed.pt", ARCHIVE_MEMBER)
    assert "it is compressed" in refusal(tmp_path / "both.zip")


def test_tensors_and_dictionaries_that_are_more_than_the_file(tmp_path: Path) -> None:
    repeated = torch.zeros(1).expand(1 << 20, 1 << 16)
    assert "larger than the whole file" in refusal(save_pickled(tmp_path / "repeated.pt", {"a": repeated}))
    assert "only dense ones" in refusal(save_pickled(tmp_path / "sparse.pt", {"a": torch.zeros(2, 2).to_sparse()}))
    assert "only dense ones" in refusal(save_pickled(tmp_path / "meta.pt", {"a": torch.zeros(2, 2, device="meta")}))
    itself: dict[str, Any] = {}
    itself["a"] = itself
    assert "contain themselves" in refusal(save_pickled(tmp_path / "itself.pt", itself))
    doubled: dict[str, Any] = {"a": torch.zeros(1)}
    for _ in range(40):
        doubled = {"a": doubled, "b": doubled}
    assert "nested too deeply" in refusal(save_pickled(tmp_path / "doubled.pt", doubled))


def test_what_torch_advises_is_not_passed_on(tmp_path: Path) -> None:
    """It names the switch that lets a file's code run."""
    whole, path = io.BytesIO(), tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(2)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as copy:
        for name in source.namelist():
            copy.writestr(name, b"\x80\x02}U\x01aa." if name.endswith("data.pkl") else source.read(name))
    with pytest.raises(CheckpointError, match="it was not read") as caught:
        read_pickled(path, "weights.pt")
    assert "weights_only" not in str(caught.value) and len(str(caught.value)) < 120


def test_what_is_whole_is_still_read(tmp_path: Path) -> None:
    view = torch.arange(8.0).view(2, 4).t()
    path = save_pickled(tmp_path / "good.pt", {"a": view, "b": view, "c": {"d": torch.ones(())}})
    held = read_pickled(path, "good")["model"]
    assert torch.equal(held["a"], view) and held["c"]["d"] == 1
    with zipfile.ZipFile(tmp_path / "good.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, ARCHIVE_MEMBER)
    assert torch.equal(read_archive(tmp_path / "good.zip")["model"]["a"], view)


def test_the_file_is_cut_at_every_point(tmp_path: Path) -> None:
    whole = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(3)}}, whole)
    with zipfile.ZipFile(tmp_path / "whole.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(ARCHIVE_MEMBER, whole.getvalue())
    data = (tmp_path / "whole.zip").read_bytes()
    for end in range(0, len(data), 7):
        (tmp_path / "cut.zip").write_bytes(data[:end])
        refusal(tmp_path / "cut.zip")


@pytest.mark.parametrize("value", [10**30, float("inf"), float("nan"), 1 << 17])
def test_sizes_in_args_that_no_model_has(value: object) -> None:
    args = {"hidden_size": 4, "num_attention_heads": value}
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        layer_sizes_from_args(args_in_file({"args": args}))


GPT2 = dict(model_type="gpt2", vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=2)
LLAMA = dict(model_type="llama", vocab_size=8, max_position_embeddings=8, hidden_size=4, num_hidden_layers=1)
LLAMA |= dict(num_attention_heads=2, num_key_value_heads=2, intermediate_size=8, rope_theta=1e4)
BERT = dict(model_type="megatron-bert", vocab_size=8, max_position_embeddings=8, hidden_size=4, num_hidden_layers=1)
BERT |= dict(num_attention_heads=2, intermediate_size=8)
ABSURD = [str(10**30), str(1 << 63), str(10**9), "-1", "1e999", "-1e999", "NaN", '"x"', "[[1]]", "1" * 4000, '{"a": {}}']


@pytest.mark.parametrize("about", [GPT2, LLAMA, BERT], ids=["gpt2", "llama", "megatron-bert"])
def test_absurd_values_of_every_field(about: dict[str, Any], tmp_path: Path) -> None:
    """None is computed with: each is refused by the name of its field, and those of no field that is read change nothing."""
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    more = ("architectures", "tie_word_embeddings", "rope_scaling", "head_dim", "n_inner", "hidden_act", "id2label")
    for field in (*about, *more):
        for value in ABSURD:
            text = json.dumps({**about, field: "@"}).replace('"@"', value)
            (tmp_path / "config.json").write_text(text)
            with pytest.raises(CheckpointError) as caught:
                read_hf(tmp_path)
            assert len(str(caught.value)) < 500, (field, value[:20])
            if field in about and field != "model_type" and value not in ('"x"', '{"a": {}}', "[[1]]", "-1", str(10**9)):
                assert f"`{field}`" in str(caught.value), (field, value[:20], str(caught.value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested too deeply"),
        ('{"n_embd": ' + "1" * 1_000_000 + "}", "more than 4300 digits"),
        ("[]", "not a JSON object"),
        ("", "not readable"),
    ],
)
def test_a_config_that_is_no_object_to_read(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_hf(tmp_path)
    assert "config.json" in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "head",
    [
        struct.pack("<Q", 10**18) + b"{}",
        b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [9223372036854775807, 2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},'
        b' "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1000000000], "data_offsets": [0, 4000000000]}}',
        b"[" * 100_000,
    ],
)
def test_headers_of_safetensors_that_lie(head: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    data = head if head[:1] == b"\0" else struct.pack("<Q", len(head)) + head + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        read_hf(tmp_path)


@pytest.mark.parametrize("table", [[["a"]], {"a": ["b"]}, {"a": "../x"}, {"a": None}, {"a": ".."}, {}, {"a": "\0"}, {"a": ""}])
def test_an_index_that_names_no_files_of_its_own(table: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(CheckpointError):
        read_hf(tmp_path)
