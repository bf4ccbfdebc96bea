"""Whatever is wrong with a checkpoint is said in one line that names the file; nothing is followed, run or half loaded."""

import hashlib
import json
import random
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sharded_state import ShardedState, build_state, save_on_ranks

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layout import (
    CheckpointError,
    Manifest,
    newest_complete,
    read_config,
    read_manifest,
    read_state,
    verify,
)
from megatron.checkpoint.load import load

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    save_on_ranks(str(root), 100, 1, 1)
    return root


@pytest.fixture
def directory(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run" / "iter_0000100"


def files(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file())


def refuse(directory, match):
    """Every way to use the directory ends in the same kind of error."""
    parts = build_state(1, 0, filled=False)
    with pytest.raises(CheckpointError, match=match):
        verify(directory)
    with pytest.raises(CheckpointError, match=match):
        load(directory, parts)
    assert all(not s.data.any() for part in parts.values() for s in part.shards()), "something was loaded"


def test_any_flipped_byte_is_found(directory):
    rng = random.Random(1)
    for path in files(directory):
        good = path.read_bytes()
        places = range(len(good)) if len(good) < 60 else rng.sample(range(len(good)), 60)
        for at in places:
            path.write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :])
            with pytest.raises(CheckpointError, match=path.name):
                verify(directory)
        path.write_bytes(good)
    verify(directory)


def test_truncated_grown_and_missing_files_are_found(directory):
    for path in files(directory):
        good = path.read_bytes()
        for bad in (good[:-1], good + b" ", b""):
            path.write_bytes(bad)
            refuse(directory, path.name)
        path.unlink()
        refuse(directory, path.name)
        path.write_bytes(good)
    verify(directory)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", "\0\1", '{"format": "megatron-checkpoint", "version": 2}', "[" * 100000]
)
def test_an_unusable_manifest_is_refused(directory, text):
    (directory / "manifest.json").write_text(text)
    refuse(directory, "manifest.json: not a usable manifest")
    newest = newest_complete(directory.parent)
    assert newest.path is None and "manifest.json: not a usable manifest" in newest.skipped[0]


def test_a_manifest_in_another_encoding(directory):
    (directory / "manifest.json").write_bytes(b"\xff\xfe\x00")
    refuse(directory, "manifest.json: not a usable manifest")


def forge_manifest(directory, change):
    """Change the manifest and give it a right checksum, as an attacker would."""
    manifest = read_manifest(directory)
    body = json.loads(manifest.to_text())
    change(body)
    del body["checksum"]
    body["checksum"] = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(body, indent=1) + "\n")


NAME = "model.embedding.word.weight"


def with_slice_at(to):
    def change(body):
        body["files"][to] = body["files"].pop("shard_00000.safetensors")
        for tensor in body["tensors"].values():
            for piece in tensor["pieces"]:
                piece["file"] = to

    return change


@pytest.mark.parametrize("to", ["../secret.safetensors", "/etc/passwd", "a/../../b", "a\\..\\b", "./x", "", "a//b"])
def test_a_path_that_leads_outside_is_refused(directory, to):
    (directory.parent / "secret.safetensors").write_bytes((directory / "shard_00000.safetensors").read_bytes())
    forge_manifest(directory, with_slice_at(to))
    refuse(directory, "leads outside the checkpoint")


def put(*path):
    *way, last, value = path

    def change(body):
        for key in way:
            body = body[key]
        body[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("tensors", NAME, "dtype", "PICKLE"), "unknown type"),
        (put("tensors", NAME, "shape", [-1, 12]), "expected a count"),
        (put("tensors", NAME, "shape", [128, 12]), "the pieces hold 1524 of 1536"),
        (put("tensors", NAME, "shape", "all"), "expected a list"),
        (put("tensors", NAME, "pieces", [{}]), "'file' is missing"),
        (put("tensors", NAME, "pieces", 0, "start", [3, 0]), "lies outside"),
        (put("tensors", NAME, "pieces", 0, "file", "another"), "not listed"),
        (put("tensors", NAME, "pieces", 0, "key", 7), "expected a string"),
        (put("files", "shard_00000.safetensors", "bytes", True), "expected a count"),
        (put("iteration", "100"), "expected a count"),
        (put("tensors", NAME, "pieces", 0, "key", "other"), "has no 'other'"),
        (put("tensors", NAME, "dtype", "I32"), "the checkpoint has|the manifest says"),
    ],
)
def test_a_manifest_that_lies(directory, change, match):
    forge_manifest(directory, change)
    with pytest.raises(CheckpointError, match=match):
        load(directory, build_state(1, 0, filled=False))


def test_a_tensor_larger_than_its_file_takes_no_memory(directory):
    """Three hundred terabytes, consistent in itself."""

    def change(body):
        tensor = body["tensors"][NAME]
        tensor["shape"] = tensor["pieces"][0]["shape"] = [10**7, 10**7]

    forge_manifest(directory, change)
    refuse(directory, "'shard_00000.safetensors' has .* bytes, too few for the .* bytes of tensors in it")


def test_a_manifest_round_trips(directory):
    text = (directory / "manifest.json").read_text()
    assert Manifest.from_text(text).to_text() == text
    forge_manifest(directory, lambda body: None)
    verify(directory)  # so the refusals above are not for a bad forgery


def test_a_foreign_file_in_place_of_a_shard(directory):
    shard = directory / "shard_00000.safetensors"
    shard.write_bytes(b"\x80\x04" + b"x" * (shard.stat().st_size - 2))  # what a pickle begins with
    refuse(directory, r"shard_00000.safetensors: (not a readable safetensors file|its bytes)")


def test_scalars_and_configuration_are_compared_with_the_manifest(directory):
    for name, reader in (("state.json", read_state), ("config.json", read_config)):
        good = (directory / name).read_text()
        (directory / name).write_text(good.replace("1", "2").replace("7", "8"))
        with pytest.raises(CheckpointError, match=f"{name}: its bytes do not match"):
            reader(directory)
        (directory / name).write_text(good)


def test_a_part_without_saved_scalars(directory):
    forge_manifest(directory, lambda body: None)
    with pytest.raises(CheckpointError, match=r"1 tensors are not in the checkpoint: other\.w"):
        load(directory, {"other": ShardedState(1, 0, tensors={"w": ((2,), None, torch.float32)})})


def test_a_near_name_comes_before_a_name_on_the_hub(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="hub"):
        find_checkpoint(Path("gpt2-large"))
    shutil.copytree(saved, tmp_path / "gpt2-large-1")
    with pytest.raises(CheckpointError, match=r"there is no such directory\. Near it: gpt2-large-1"):
        find_checkpoint(Path("gpt2-large"))


def test_find_says_what_is_there(saved, tmp_path):
    assert (
        find_checkpoint(saved)
        == find_checkpoint(saved, 100)
        == find_checkpoint(saved / "iter_0000100")
        == saved / "iter_0000100"
    )
    run = tmp_path / "gpt-345m"
    shutil.copytree(saved, run)
    shutil.copytree(run / "iter_0000100", run / "iter_0000200")
    with pytest.raises(CheckpointError, match=r"gpt-345: there is no such directory\. Near it: .*gpt-345m"):
        find_checkpoint(tmp_path / "gpt-345")
    with pytest.raises(CheckpointError, match=r"there is no iteration 300\. Iterations there: 100, 200; choose one with"):
        find_checkpoint(run, 300)
    with pytest.raises(CheckpointError, match="it is of iteration 100, not 300"):
        find_checkpoint(run / "iter_0000100", 300)
    with pytest.raises(CheckpointError, match="this is a file"):
        find_checkpoint(run / "iter_0000100" / "config.json")
    (run / "iter_0000200" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000200: it has no manifest.json.*Iterations there: 100, 200"):
        find_checkpoint(run, 200)
    with pytest.raises(CheckpointError, match=r"iter_0000200: it has no manifest.json, so it is unfinished"):
        find_checkpoint(run / "iter_0000200")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="No iter_ directory is there"):
        find_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize("text", ["", "release", "-5", "1e3", "99999999999999999999", "150", "200", None])
def test_find_takes_the_newest_whole_one_and_says_what_it_passed_over(saved, tmp_path, text):
    """A bad tracker, one that names what is not there, one that names what is torn, and none."""
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    shutil.copytree(run / "iter_0000100", run / "iter_0000200")
    (run / "iter_0000200" / "manifest.json").unlink()
    tracker = run / "latest_checkpointed_iteration.txt"
    tracker.unlink() if text is None else tracker.write_text(text)
    said = []
    assert find_checkpoint(run, report=said.append) == run / "iter_0000100"
    why = {None: "", "150": "it names iteration 150, which is not there", "200": ""}.get(text, "expected an iteration number")
    first, last = said if why else ("", *said)
    assert why in first and ("iter_0000200: it has no manifest.json" if text != "150" else "150; 200 is later") in last
    with pytest.raises(CheckpointError, match=why or "no manifest.json"):  # what is meant, and it is not whole
        verify(find_checkpoint(run, skip_damaged=False))
    shutil.rmtree(run / "iter_0000100")
    with pytest.raises(CheckpointError, match=f"is complete: .*{why}.*has no manifest.json.*Iterations there: 200"):
        find_checkpoint(run)


def test_inspect_and_verify_name_the_damage(directory, monkeypatch, capsys):
    def tool(name, *arguments):
        """The tool's `main` in this process, since starting torch takes seconds."""
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        code = runpy.run_path(str(TOOLS / name))["main"]()
        return code, *capsys.readouterr()

    code, out, _ = tool("verify_checkpoint.py", directory.parent)
    assert code == 0 and "all as the manifest says" in out
    code, out, _ = tool("inspect_checkpoint.py", directory, "--json")
    about = json.loads(out)
    assert code == 0 and about["iteration"] == 100 and about["tensors"][NAME]["shape"] == [127, 12]
    assert about["state"]["model"]["iteration"] == 7 and about["config"]["layout"] == {"tp": 1}
    code, out, _ = tool("inspect_checkpoint.py", directory.parent)
    assert code == 0 and "127 x 12" in out
    for name in ("verify_checkpoint.py", "inspect_checkpoint.py"):
        code, _, err = tool(name, directory.parent / "nothing")
        assert code == 2 and err.startswith("error: ") and "no such directory" in err
    shard = directory / "shard_00000.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    code, _, err = tool("verify_checkpoint.py", directory.parent)
    assert code == 1 and "shard_00000.safetensors: its bytes do not match" in err
    (directory / "manifest.json").unlink()
    code, _, err = tool("verify_checkpoint.py", directory)
    assert code == 1 and "it has no manifest.json" in err
    code, _, err = tool("inspect_checkpoint.py", directory)
    assert code == 2 and "it has no manifest.json" in err


def test_a_tool_as_it_is_typed(directory, tmp_path):
    (directory / "state.json").unlink()
    command = [sys.executable, str(TOOLS / "verify_checkpoint.py"), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"error: {directory}/state.json: No such file or directory\n"
