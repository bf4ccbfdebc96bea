"""The rules that look at the disk: what is named must be there, and what will be written must be writable."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from legal_run import argv, problems

from megatron.config.command_line.parse import parse
from megatron.config.errors import ConfigError
from megatron.files.prefixes import suggest_prefix


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    for name in ("good.bin", "good.idx", "half.bin", "vocab.json", "merges.txt"):
        (tmp_path / name).write_text("x")
    for name in ("corpus_text_document", "data/x", "data/y", "split_text_sentence"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        for ending in (".bin", ".idx"):
            (tmp_path / (name + ending)).write_text("x")
    for name in ("corpus.jsonl", "raw.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}')
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "hf/model.safetensors").write_text("x")
    (tmp_path / "lm/iter_0000004/mp_rank_00").mkdir(parents=True)
    (tmp_path / "empty.bin").write_text("")
    (tmp_path / "empty.idx").write_text("x")
    for folder in (
        "run/iter_0000010",
        "run/iter_0000020",
        "torn/iter_0000010",
        "nothing",
        "other",
        "half/iter_0000003",
        "torn/iter_0000040",
        "lost/iter_0000007",
        "emptied",
    ):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("20\n")
    (tmp_path / "torn/latest_checkpointed_iteration.txt").write_text("30")
    (tmp_path / "half/latest_checkpointed_iteration.txt").write_text("3")
    (tmp_path / "other/readme").write_text("x")
    (tmp_path / "emptied/latest_checkpointed_iteration.txt").write_text("3")
    for folder in ("run/iter_0000010", "run/iter_0000020", "torn/iter_0000010", "lost/iter_0000007"):
        (tmp_path / folder / "manifest.json").write_text("{}")
    (tmp_path / "loose").symlink_to("nowhere")
    return tmp_path


LONG = "x" * 250
CLONED = "where it was cloned"
HUB = (
    "from which nothing is downloaded; `huggingface-cli download openai-community/gpt2 --local-dir DIR`, then `python "
    "tools/import_hf.py --input DIR --save CKPT`, and give CKPT"
)
LOAD = "then --load CKPT (with --finetune to start training from it)"
MAKE = "python tools/preprocess_data.py"
NO_CORPUS = "names no dataset: corpus.bin and corpus.idx do not exist"


def on_disk(disk: Path, change: str) -> list[str]:
    return [line.replace(f"{disk}/", "") for line in problems(change.replace("@", f"{disk}/"), check_disk=True)]


FRESH = "; leave out --load to start from new weights, or use --auto-resume to resume from --save if it has checkpoints"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--data-path @goood", "`--data-path goood` names no dataset: goood.bin and goood.idx do not exist; near it: good"),
        ("--data-path @half", "`--data-path half` is not a dataset: half.idx does not exist"),
        ("--data-path @empty", "`--data-path empty` is not a dataset: empty.bin is empty"),
        ("--data-path 1 @good 1 @half", "`--data-path half` is not a dataset: half.idx does not exist"),
        (
            "--data-path @gone/x",
            "`--data-path gone/x` names no dataset: gone/x.bin and gone/x.idx do not exist; DISK has no gone",
        ),
        (
            "--tokenizer-type GPT2BPETokenizer --vocab-file @vocab.jso --merge-file @merges.txt",
            "`--vocab-file vocab.jso` does not exist; near it: vocab.json",
        ),
        (
            "--tokenizer-type GPT2BPETokenizer --vocab-file @vocab.json --merge-file @empty.bin",
            "`--merge-file empty.bin` is empty",
        ),
        (
            "--tokenizer-type HuggingFaceTokenizer --tokenizer-model @other",
            "`--tokenizer-model other` other/tokenizer.json does not exist",
        ),
        ("--load @rum", "`--load rum` does not exist; near it: run" + FRESH),
        ("--load @good.bin", "`--load good.bin` is a file; a checkpoint is a directory" + FRESH),
        ("--load @nothing", "`--load nothing` is an empty directory" + FRESH),
        ("--load @half/iter_0000003", "`--load half/iter_0000003` is an empty directory" + FRESH),
        (
            "--load @half",
            "`--load half` holds no finished checkpoint: none of its iter_ directories has a manifest.json" + FRESH,
        ),
        (
            "--load @torn --load-iteration 40",
            "`--load torn` is not finished: torn/iter_0000040/manifest.json does not exist; "
            "choose another with --load-iteration; legal: 10",
        ),
        (
            "--load @other",
            "`--load other` holds no checkpoint: neither manifest.json nor an iter_ directory" + FRESH,
        ),
        ("--load @rum --save @nothing --save-interval 1", "`--load rum` does not exist; near it: run" + FRESH),
        (
            "--load @nothing --save @nothing --save-interval 1 --exit-on-missing-checkpoint",
            "`--load nothing` is an empty directory" + FRESH,
        ),
        ("--load @nothing --save @nothing --save-interval 1 --finetune", "`--load nothing` is an empty directory" + FRESH),
        ("--load @nothing --save @nothing --save-interval 1 --skip-train", "`--load nothing` is an empty directory" + FRESH),
        (
            "--load @nothing --save @nothing --save-interval 1 --load-iteration 5",
            "`--load nothing` is an empty directory" + FRESH,
        ),
        (
            "--load @half --save @half --save-interval 1",
            "`--load half` holds no finished checkpoint: none of its iter_ directories has a manifest.json" + FRESH,
        ),
        (
            "--load @emptied --save @emptied --save-interval 1",
            "`--load emptied` holds no checkpoint: neither manifest.json nor an iter_ directory" + FRESH,
        ),
        ("--load @run --load-iteration 15", "`--load-iteration 15` is not in run; legal: 10, 20"),
        (
            "--load @run/iter_0000010 --load-iteration 20",
            "`--load run/iter_0000010` and `--load-iteration 20` name different iterations",
        ),
        ("--save @good.bin/x --save-interval 1", "`--save good.bin/x` cannot be written: good.bin is a file, not a directory"),
        (
            "--save @loose --save-interval 1",
            "`--save loose` cannot be written: loose is a link to nowhere, which does not exist",
        ),
        (
            "--save @loose/x --save-interval 1",
            "`--save loose/x` cannot be written: loose is a link to nowhere, which does not exist",
        ),
        (
            "--save @a-name-of-LONG --save-interval 1",
            "`--save a-name-of-LONG` cannot be made: a name in it has more than 255 bytes",
        ),
        (
            "--save /proc/run --save-interval 1",
            "`--save /proc/run` cannot be written: /proc belongs to the kernel, and no file can be made there",
        ),
        (
            "--save /dev/null/x --save-interval 1",
            "`--save /dev/null/x` cannot be written: /dev/null is a device, not a directory",
        ),
        (
            "--load @pointer",
            "`--load pointer` is a file, a pointer of Git LFS, in place of the file itself; run `git lfs pull` " + CLONED,
        ),
        ("--load openai-community/gpt2", "`--load openai-community/gpt2` is a name on the Hugging Face hub, " + HUB),
        (
            "--load @hf",
            "`--load hf` is a Hugging Face directory; import it: `python tools/import_hf.py --input hf --save CKPT`, " + LOAD,
        ),
        (
            "--load @lm",
            "`--load lm` is a checkpoint of Megatron-LM; import it: `python tools/import_megatron.py --load lm --save CKPT`, "
            + LOAD,
        ),
        (
            "--tokenizer-type HuggingFaceTokenizer --tokenizer-model gpt2",
            "`--tokenizer-model gpt2` is a name on the Hugging Face hub, from which nothing is downloaded; "
            "`huggingface-cli download gpt2 --local-dir DIR`, then give DIR",
        ),
        (
            "--tokenizer-type GPT2BPETokenizer --vocab-file @pointer --merge-file @merges.txt",
            "`--vocab-file pointer` is a pointer of Git LFS, in place of the file itself; run `git lfs pull` " + CLONED,
        ),
        ("--data-path @corpus", f"`--data-path corpus` {NO_CORPUS}; give corpus_text_document, which is beside it"),
        ("--data-path @corpus.bin", f"`--data-path corpus.bin` {NO_CORPUS}; give corpus_text_document, which is beside it"),
        (
            "--data-path 0.5 @corpus 0.5 @good",
            f"`--data-path corpus` {NO_CORPUS}; give corpus_text_document, which is beside it",
        ),
        (
            "--data-path @corpus.jsonl",
            "`--data-path corpus.jsonl` "
            + NO_CORPUS.replace("corpus.", "corpus.jsonl.")
            + "; give corpus_text_document, which is beside it",
        ),
        (
            "--data-path @data",
            "`--data-path data` names no dataset: data.bin and data.idx do not exist; give one of data/x, data/y",
        ),
        (
            "--data-path @raw.jsonl",
            "`--data-path raw.jsonl` names no dataset: raw.jsonl.bin and raw.jsonl.idx do not exist; raw.jsonl is a text; "
            f"preprocess it first: `{MAKE} --input raw.jsonl --output-prefix raw --tokenizer-type ... "
            "--append-eod`, then give raw_text_document",
        ),
        (
            "--data-path @split",
            "`--data-path split` names no dataset: split.bin and split.idx do not exist; only "
            f"split_text_sentence is beside it, with single sentences for BERT; create the other kind: "
            f"`{MAKE} --input TEXT.jsonl --output-prefix split "
            "--tokenizer-type ... --append-eod`",
        ),
        ("--tensorboard-dir @good.bin", "`--tensorboard-dir good.bin` cannot be written: good.bin is a file, not a directory"),
        ("--metrics-path @good.bin/m", "`--metrics-path good.bin/m` cannot be written: good.bin is a file, not a directory"),
    ],
)
def test_wrong_files_are_refused(change: str, message: str, disk: Path) -> None:
    change = (change if "--data-path" in change else f"--data-path @good {change}").replace("LONG", LONG)
    assert on_disk(disk, change) == [message.replace("DISK", str(disk)).replace("LONG", LONG)]


@pytest.mark.parametrize(
    "change",
    [
        "",
        "--load @run",
        "--load @run --load-iteration 10",
        "--load @run/iter_0000010",
        "--load @torn --load-iteration 10",
        "--load @torn",
        "--load @lost",
        "--load @nothing --save @nothing --save-interval 1",
        "--load @rum --save @rum/ --save-interval 1",
        "--load @nothing/../rum --save @rum --save-interval 1 --use-checkpoint-args",
        "--save @new/deep --save-interval 1 --tensorboard-dir @new/tb",
        "--tokenizer-type GPT2BPETokenizer --vocab-file @vocab.json --merge-file @merges.txt",
        "--data-path @good.bin",
    ],
)
def test_right_files_are_silent(change: str, disk: Path) -> None:
    assert on_disk(disk, change if "--data-path" in change else f"--data-path @good {change}".strip()) == []


def test_what_may_not_be_read_or_written(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.access
    locked = {str(disk / "vocab.json"): os.R_OK, str(disk / "nothing"): os.W_OK}

    def access(path: Any, mode: int) -> bool:
        return not locked.get(str(path), 0) & mode and real(path, mode)

    monkeypatch.setattr(os, "access", access)
    tokenizer = "--tokenizer-type GPT2BPETokenizer --vocab-file @vocab.json --merge-file @merges.txt"
    assert on_disk(disk, f"--data-path @good {tokenizer}") == ["`--vocab-file vocab.json` cannot be read: permission denied"]
    assert on_disk(disk, "--data-path @good --save @nothing/run --save-interval 1") == [
        "`--save nothing/run` cannot be written: permission denied in nothing"
    ]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("place", ["no", "no/x"])
def test_another_user_hears_of_permissions_in_words(place: str, disk: Path) -> None:
    """Really as one, to whom a directory is closed: no look at the disk may fail in another way."""
    (disk / "no").mkdir(mode=0o700)
    (disk / "no/x").mkdir()
    settings = {
        "--data-path @good --load @P": "--load",
        "--data-path @good --save @P --save-interval 1": "--save",
        "--data-path @good --load @P --save @P/run --save-interval 1": "--load",
        "--data-path @P": "--data-path",
        "--data-path @good --tensorboard-dir @P": "--tensorboard-dir",
        "--data-path @good --metrics-path @P/m": "--metrics-path",
        "--data-path @good --tokenizer-type HuggingFaceTokenizer --tokenizer-model @P": "--tokenizer-model",
        "--data-path @good --tokenizer-type BertWordPieceCase --vocab-file @P": "--vocab-file",
        "--data-path @good --stop-file @P/stop": "--stop-file",
    }
    on_disk(disk, "--data-path @good")  # everything is imported before, of what he may not read either
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            for folder in (disk, *disk.parents[:2]):
                os.chmod(folder, 0o755)
            os.setgid(65534)
            os.setuid(65534)
            found = {change: on_disk(disk, change.replace("@P", f"@{place}")) for change in settings}
        except BaseException as error:
            found = {"failed": [repr(error)]}
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        found = json.loads(pipe.read())
    assert found.keys() == settings.keys(), found
    for change, lines in found.items():
        assert any(line.startswith(f"`{settings[change]} ") for line in lines), (change, lines)
        assert not any("Errno" in line for line in lines), lines


def test_a_disk_that_is_mounted_read_only(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = os.statvfs(disk)
    read_only = os.statvfs_result((*about[:8], about.f_flag | os.ST_RDONLY, *about[9:]))
    monkeypatch.setattr(os, "statvfs", lambda path: read_only)
    assert on_disk(disk, "--data-path @good --save @nothing/run --save-interval 1") == [
        "`--save nothing/run` cannot be written: nothing is on a file system that is mounted read-only"
    ]


def test_a_prefix_for_bert(disk: Path) -> None:
    assert suggest_prefix(str(disk / "split"), "sentence") == f"give {disk}/split_text_sentence, which is beside it"
    assert "is beside it, with whole documents for GPT" in (suggest_prefix(str(disk / "corpus"), "sentence") or "")
    assert suggest_prefix(str(disk / "nowhere"), "document") is None


def test_a_stop_file_can_appear_and_go(disk: Path) -> None:
    assert on_disk(disk, "--data-path @good --stop-file @run/enough") == []
    assert on_disk(disk, "--data-path @good --stop-file @run") == ["`--stop-file run` is a directory, not a file"]
    assert on_disk(disk, "--data-path @good --stop-file @no/enough") == [
        "`--stop-file no/enough` can never appear: there is no directory no"
    ]


def test_a_dry_run_may_leave_out_what_lies_on_the_disk() -> None:
    words = argv("--no:data-path --tokenizer-type GPT2BPETokenizer")
    with pytest.raises(ConfigError):
        parse(words, program="t")
    assert parse([*words, "--dry-run"], program="t").dry_run
    with pytest.raises(ConfigError, match="names no dataset"):
        parse([*words, "--dry-run", "--data-path", "/no/such"], program="t")
