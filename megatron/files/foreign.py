"""Recognises files and directories of other programs by what lies in them, so that messages name them and say what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from megatron.files.regular import open_regular, read_json

HEAD_BYTES = 1 << 10  # of a file, by which it is recognised
LFS = b"version https://git-lfs."
MAGIC = (  # how a file begins, what it is, what to do
    (LFS, "a pointer of Git LFS, in place of the file itself", "run `git lfs pull` where it was cloned"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it, or give it a name that ends in .gz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstandard", "unpack it, or give it a name that ends in .zst"),
    (b"BZh", "compressed with bzip2", "unpack it first"),
    (b"\xfd7zXZ", "compressed with xz", "unpack it first"),
    (b"PK\x03\x04", "a zip archive", "unpack it first"),
    (b"PAR1", "a Parquet file", "write its rows as JSON lines first"),
    (b"GGUF", "a GGUF file, of llama.cpp", "get the model's safetensors instead"),
    (b"%PDF", "a PDF file", "give its text"),
    (b"\xff\xfe", "text in UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "save it as UTF-8"),
)
MAX_NULLS = 0.2  # share of null bytes in a text; UTF-16 of Latin letters has a half

# Names on the Hugging Face hub: of an owner and a model, or of the oldest models alone.
OWNED = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
OLDEST = re.compile(
    r"(gpt2(-medium|-large|-xl)?|distilgpt2|openai-gpt|bert-(base|large)-.*|distilbert-.*|roberta-(base|large)|"
    r"albert-.*|electra-.*|t5-(small|base|large|3b|11b)|xlnet-.*|xlm-.*|megatron-bert-.*)"
)
LOCAL = re.compile(  # how people call directories of their own
    r"(runs?|checkpoints?|ckpts?|data(sets?)?|out(puts?)?|saved?|saves|results?|exps?|experiments|logs?|te?mp|work(space)?|scratch|"
    r"models?|weights|pretrained|tests?|home|root|mnt|examples|tools|tasks)"
)
THEN = "then --load CKPT (training begins from it with --finetune)"


@dataclass(frozen=True)
class Foreign:
    """Something that another program made. what: its kind, in words. advice: what to do with it here."""

    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}"


def foreign_bytes(head: bytes, *, text: bool = True) -> Foreign | None:
    """Recognise a file that is something else than it should be by its first bytes; None where they show nothing.

    head: at most HEAD_BYTES of it. text: whether it should be text, in which null bytes are rare.
    """
    for magic, what, advice in MAGIC:
        if head.startswith(magic):
            return Foreign(what, advice)
    if text and head.count(0) > MAX_NULLS * len(head):
        return Foreign("no text, or text in UTF-16", "save it as UTF-8")
    return None


def foreign_file(path: str | os.PathLike[str]) -> Foreign | None:
    """Recognise a file by its first bytes, as `foreign_bytes`; None for one that cannot be read."""
    try:
        with open_regular(path) as file:
            return foreign_bytes(file.read(HEAD_BYTES), text=False)
    except OSError:
        return None


def is_pointer(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is what Git leaves in place of a large one that it did not fetch."""
    try:
        with open_regular(path) as file:
            return file.read(len(LFS)) == LFS
    except OSError:
        return False


def hub_name(name: str | os.PathLike[str], then: str = "give DIR") -> Foreign | None:
    """Recognise the name of a model on the Hugging Face hub where a path on this machine should stand.

    A path whose first directory is there, or is called as people call those of their own, is none.

    Args:
        name: what was given; there is nothing of that name here.
        then: what to do when it was downloaded to DIR, for the advice.

    Returns:
        What it is; None for what is no such name, and for a path that is there.
    """
    text = os.fspath(name)
    found = re.sub(r"^(https?://)?(www\.)?(huggingface\.co|hf\.co)/|^hf://", "", text)
    linked = found != text
    found = "/".join(found.split("/")[:2]) if linked else found
    if os.path.lexists(text):
        return None
    if not linked:
        owner = found.split("/")[0]
        owned = (
            OWNED.fullmatch(found) and not os.path.lexists(owner) and not LOCAL.fullmatch(owner.lower()) and "." not in owner
        )
        if not owned and not OLDEST.fullmatch(found):
            return None
    get = f"huggingface-cli download {found} --local-dir DIR"
    return Foreign("a name on the Hugging Face hub, from which nothing is downloaded", f"`{get}`, then {then}")


def foreign_directory(path: str | os.PathLike[str], reader: str = "ours") -> Foreign | None:
    """Recognise a directory of weights that another program made; None for any other, and for one that cannot be read.

    reader: what is to be read there: a checkpoint of ours, one of `Megatron-LM`, or a `Hugging Face` directory.
    """
    root = Path(path)
    for kind in KINDS[reader]:
        try:
            found = kind(root)
        except OSError:
            return None
        if found is not None:
            return found
    return None


def unfit_directory(path: str | os.PathLike[str], reader: str) -> str | None:
    """Say why weights of another program cannot be read there, in words that go on after the name; None where they may be.

    reader: as of `foreign_directory`.
    """
    if not os.path.isdir(path):
        hub = hub_name(path, "give DIR" if reader == "Hugging Face" else f"`{_importing('DIR')}`")
        what = "it is a file; give the directory that it lies in" if os.path.exists(path) else "there is no such directory"
        other = foreign_file(path) or hub
        return f"it is {other}" if other else what
    if not os.access(path, os.R_OK | os.X_OK):
        return "it cannot be read: permission denied"
    found = foreign_directory(path, reader)
    return f"it is {found}" if found else None


def foreign(path: str | os.PathLike[str]) -> Foreign | None:
    """Recognise whatever stands in the place of a directory of checkpoints: a directory, a file or the name of neither."""
    if os.path.isdir(path):
        return foreign_directory(path)
    if os.path.lexists(path):
        return foreign_file(path)
    return hub_name(path, f"`{_importing('DIR')}`, and give CKPT")


def _own(root: Path) -> Foreign | None:
    if any(path.name == "manifest.json" and path.with_name("state.json").exists() for path in _inside(root)):
        return Foreign("a checkpoint of this program, which needs no import", f"give it to --load: --load {root}")
    return None


def _inside(root: Path) -> list[Path]:
    """Everything in a directory and in its directories of iterations."""
    entries = list(root.iterdir())
    steps = [p for p in entries if re.fullmatch(r"iter_\d+|release|(global_)?step[-_]?\d+|weights|checkpoint-\d+", p.name)]
    return [*entries, *(inner for step in sorted(steps)[:100] if step.is_dir() for inner in step.iterdir())]


def _names(paths: Iterable[Path], pattern: str) -> list[Path]:
    return sorted(path for path in paths if re.fullmatch(pattern, path.name))


def _deepspeed(root: Path) -> Foreign | None:
    if not _names(_inside(root), r"global_step\d+|zero_to_fp32\.py|.*_model_states\.pt|(bf16_)?zero_pp_rank_.*\.pt"):
        return None
    advice = "have its program write a Hugging Face directory DIR (zero_to_fp32.py in it joins the weights)"
    return Foreign("a checkpoint of DeepSpeed", f"{advice}, then `{_importing('DIR')}`")


def _megatron_core(root: Path) -> Foreign | None:
    inside = _inside(root)
    shards = _names(inside, r"__\d+_\d+\.distcp|\.metadata")
    core = _names(inside, r"common\.pt")
    if not core and not shards:
        return None
    if core or _names(inside, r"latest_checkpointed_iteration\.txt"):
        save = "have it saved there with --ckpt-format torch (--ckpt-convert-format torch --ckpt-convert-save DIR converts it)"
        advice = f"{save}, then `{_importing_megatron('DIR')}`"
        return Foreign("a distributed checkpoint of Megatron-Core (torch_dist), which is not read here", advice)
    return Foreign(
        "a distributed checkpoint of PyTorch (torch.distributed.checkpoint), which is not read here",
        f"have its program write a Hugging Face directory DIR, then `{_importing('DIR')}`",
    )


def _megatron_lm(root: Path) -> Foreign | None:
    if not _names(_inside(root), r"mp_rank_\d+(_\d+)*"):
        return None
    return Foreign("a checkpoint of Megatron-LM", f"import it: `{_importing_megatron(root)}`, {THEN}")


def _hub_cache(root: Path) -> Foreign | None:
    if os.path.lexists(root / "config.json"):
        return None
    kept = {"snapshots/*/config.json": "the Hugging Face hub's cache", "checkpoint-*/config.json": "the Hugging Face Trainer"}
    for pattern, maker in kept.items():
        if found := sorted(root.glob(pattern), key=os.path.getmtime):
            return Foreign(f"a directory of {maker}", f"the model is in {found[-1].parent}")
    return None


def _adapter(root: Path) -> Foreign | None:
    if not os.path.lexists(root / "adapter_config.json") or os.path.lexists(root / "config.json"):
        return None
    advice = "merge it with its model by merge_and_unload() and save_pretrained, and import that"
    return Foreign("a PEFT adapter, of weights that change a model's", advice)


def _hugging_face(root: Path) -> Foreign | None:
    entries = list(root.iterdir())
    weights = _names(entries, r"(model|pytorch_model|tf_model|flax_model)[\w.-]*\.(safetensors|bin|h5|msgpack)(\.index\.json)?")
    if not weights and not _is_hugging_face(root / "config.json"):
        return None
    safe, pickled = _names(weights, r".*safetensors.*"), _names(weights, r".*\.bin.*")
    if weights and not safe:
        what = f"a Hugging Face directory without safetensors ({weights[0].name}{', a pickle' * bool(pickled)})"
        save = "open it with transformers and save_pretrained it to DIR"
        return Foreign(what, f"{save}, then `{_importing('DIR')}`")
    if pointers := [path for path in safe if is_pointer(path)]:
        what = f"a Hugging Face directory whose {pointers[0].name} is a pointer of Git LFS"
        return Foreign(what, f"run `git lfs pull` in it, then `{_importing(root)}`")
    return Foreign("a Hugging Face directory", f"import it: `{_importing(root)}`, {THEN}")


def _is_hugging_face(config: Path) -> bool:
    """Return whether a config.json is one of transformers; a checkpoint of this program has tables in it."""
    try:
        about = read_json(config)
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and not {"model_type", "architectures"}.isdisjoint(about)


def _single_files(root: Path) -> Foreign | None:
    """Recognise what torch.save and others leave: one file that holds everything."""
    found = _names(root.iterdir(), r".*\.(pt|pth|ckpt|nemo|gguf)")
    if not found:
        return None
    return Foreign(
        f"a directory with {found[0].name}, of another program",
        f"have that write a Hugging Face directory DIR, then `{_importing('DIR')}`",
    )


def _importing(directory: object) -> str:
    return f"python tools/import_hf.py --input {directory} --save CKPT"


def _importing_megatron(directory: object) -> str:
    return f"python tools/import_megatron.py --load {directory} --save CKPT"


Kind = Callable[[Path], Foreign | None]
KINDS: Mapping[str, tuple[Kind, ...]] = MappingProxyType(  # for what each reader takes a directory
    {
        "ours": (_deepspeed, _megatron_core, _megatron_lm, _hub_cache, _adapter, _hugging_face, _single_files),
        "Megatron-LM": (_own, _deepspeed, _megatron_core, _hub_cache, _adapter, _hugging_face),
        "Hugging Face": (_own, _deepspeed, _megatron_core, _megatron_lm, _hub_cache),
    }
)
