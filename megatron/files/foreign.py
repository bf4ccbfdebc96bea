"""Recognize files and directories of other programs by their content, so that error messages name them and give advice."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from megatron.files.regular import open_regular, read_json

HEAD_BYTES = 1 << 10  # bytes of a file that are read to recognize it; tar's mark is at byte 257
LFS = b"version https://git-lfs."
# First bytes of the kinds of compression that are unpacked when text is read, and the programs that unpack them elsewhere.
PACKED = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstandard"),
    *((bytes([n]) + b"\x2a\x4d\x18", "zstandard") for n in range(0x50, 0x60)),  # a skippable frame
    *((b"BZh%d" % level + begin, "bzip2") for level in range(1, 10) for begin in (b"1AY&SY", b"\x17rE8P\x90")),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x5d\x00\x00", "lzma"),
)
UNPACKERS = MappingProxyType({"gzip": "gzip", "zstandard": "zstd", "bzip2": "bzip2", "xz": "xz", "lzma": "xz"})
LINES = 'write one JSON object a line, such as {"text": "..."}'
TABLE = f"{LINES}: `python -c \"import pandas; pandas.read_%s('FILE').to_json('FILE.jsonl', orient='records', lines=True)\"`"
UNPACK = "unpack it and name the files in it"
ENCODING = "convert it: `iconv -f %s -t UTF-8 FILE > NEW`"
# Kinds of files that no reader accepts: offset of the mark, the mark, the kind, the advice for FILE. A mark of letters alone
# could begin a text, so it counts only together with bytes that no text has.
MARKS = (
    (0, LFS, "a pointer of Git LFS, in place of the file itself", "run `git lfs pull` where it was cloned"),
    (0, b"PAR1", "a Parquet file", TABLE % "parquet"),
    (0, b"ARROW1", "an Arrow file", TABLE % "feather"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream, as the package datasets keeps them", f"{LINES}: its `Dataset.to_json`"),
    (0, b"ORC", "an ORC file", TABLE % "orc"),
    (0, b"Obj\x01", "an Avro file", LINES),
    (0, b"\x89HDF", "an HDF5 file", LINES),
    (0, b"SQLite format 3\x00", "an SQLite database", LINES),
    (0, b"%PDF-", "a PDF file", "give its text"),
    (0, b"GGUF", "a GGUF file, of llama.cpp", "get the model's safetensors instead"),
    (0, b"MMIDIDX\x00", "the index of an indexed dataset, which was preprocessed already", "name its prefix as --data-path"),
    (0, b"PK\x03\x04", "a zip archive", UNPACK),
    (0, b"PK\x05\x06", "an empty zip archive", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"\x04\x22\x4d\x18", "compressed with LZ4", "unpack it: `lz4 -d FILE`"),
    (0, b"\xff\x06\x00\x00sNaPpY", "compressed with Snappy", "unpack it"),
    (0, b"\x1f\x9d", "compressed with compress", "unpack it: `gzip -d FILE`"),
    (0, b"LZIP", "compressed with lzip", "unpack it: `lzip -d FILE`"),
    (0, b"\xff\xfe\x00\x00", "text in UTF-32, not UTF-8", ENCODING % "UTF-32"),
    (0, b"\x00\x00\xfe\xff", "text in UTF-32, not UTF-8", ENCODING % "UTF-32"),
    (0, b"\xff\xfe", "text in UTF-16, not UTF-8", ENCODING % "UTF-16"),
    (0, b"\xfe\xff", "text in UTF-16, not UTF-8", ENCODING % "UTF-16"),
)
# UTF-16 without a byte-order mark: which of the four bytes of two Latin characters are zero. As UTF-8 they are valid text, too.
UNMARKED: Mapping[tuple[bool, ...], str] = MappingProxyType(
    {(False, True, False, True): "UTF-16LE", (True, False, True, False): "UTF-16BE"}
)
MAX_ZEROS = 0.2  # share of zero bytes in a text

# Names on the Hugging Face hub: owner and model, or for the oldest models the model alone.
OWNED = re.compile(r"(?<![\w.-])[\w-][\w.-]*/[\w-][\w.-]*")
UNOWNED = re.compile(
    r"(gpt2(-medium|-large|-xl)?|distilgpt2|openai-gpt|bert-(base|large)-.*|distilbert-.*|roberta-(base|large)|"
    r"albert-.*|electra-.*|t5-(small|base|large|3b|11b)|xlnet-.*|xlm-.*|megatron-bert-.*)"
)
LOCAL = re.compile(  # usual names of local directories
    r"(runs?|checkpoints?|ckpts?|data(sets?)?|out(puts?)?|saved?|saves|results?|exps?|experiments|logs?|te?mp|work(space)?|scratch|"
    r"models?|weights|pretrained|tests?|home|root|mnt|examples|tools|tasks)"
)
THEN = "then --load CKPT (training begins from it with --finetune)"


@dataclass(frozen=True)
class ForeignFormat:
    """The format of a file or directory of another program.

    Attributes:
        what: its description: `a Parquet file`.
        advice: what the user should do with it.
    """

    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}"


POINTER = ForeignFormat(*next((what, advice) for _, mark, what, advice in MARKS if mark == LFS))


def packing(head: bytes) -> str | None:
    """Return the compression of a file that begins with these bytes; None for none."""
    return next((kind for mark, kind in PACKED if head.startswith(mark)), None)


def recognize_bytes(head: bytes, file: str | os.PathLike[str] = "FILE", *, text: bool = True) -> ForeignFormat | None:
    """Recognize a foreign file by its first bytes.

    Args:
        head: its first HEAD_BYTES bytes.
        file: its name, for commands in the advice.
        text: the file is expected to be text, in which zero bytes are rare.

    Returns:
        Its format; None if it is not recognized.
    """
    name = os.fspath(file)
    if kind := packing(head):
        return ForeignFormat(f"compressed with {kind}", f"unpack it: `{UNPACKERS[kind]} -d {name}`")
    # No text has bytes below the tab character.
    binary = any(byte < 9 for byte in head)
    for place, mark, what, advice in MARKS:
        if head[place:].startswith(mark) and (binary or not mark.isalnum()):
            return ForeignFormat(what, advice.replace("FILE", name))
    if text and (encoding := UNMARKED.get(tuple(byte == 0 for byte in head[:4]))):
        return ForeignFormat("text in UTF-16, not UTF-8", (ENCODING % encoding).replace("FILE", name))
    if text and head.count(0) > MAX_ZEROS * len(head):
        return ForeignFormat("no text: many of its bytes are zeros", "give a file of text in UTF-8")
    return None


def recognize_file(path: str | os.PathLike[str]) -> ForeignFormat | None:
    """Recognize a file by its first bytes, as `recognize_bytes`; None for one that cannot be read."""
    try:
        with open_regular(path) as file:
            return recognize_bytes(file.read(HEAD_BYTES), path, text=False)
    except OSError:
        return None


def is_lfs_pointer(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a pointer of Git LFS, which stands for a large file that was not fetched."""
    try:
        with open_regular(path) as file:
            return file.read(len(LFS)) == LFS
    except OSError:
        return False


def recognize_hub_name(name: str | os.PathLike[str], then: str = "give DIR") -> ForeignFormat | None:
    """Recognize the name of a model on the Hugging Face hub that was given instead of a local path.

    A path whose first directory exists, or has a usual name of a local directory, is not taken for a name of the hub.

    Args:
        name: the name that was given.
        then: what to do after the model was downloaded to DIR, for the advice.

    Returns:
        The description of the name; None if it is no name of the hub, or exists locally.
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
        if not owned and not UNOWNED.fullmatch(found):
            return None
    get = f"huggingface-cli download {found} --local-dir DIR"
    return ForeignFormat("a name on the Hugging Face hub, from which nothing is downloaded", f"`{get}`, then {then}")


def recognize_directory(path: str | os.PathLike[str], reader: str = "ours") -> ForeignFormat | None:
    """Recognize a directory of weights of another program; None for any other, and for one that cannot be read.

    Args:
        path: the directory.
        reader: the expected format, which is not foreign: `ours`, `Megatron-LM` or `Hugging Face`.
    """
    root = Path(path)
    for recognizer in RECOGNIZERS[reader]:
        try:
            found = recognizer(root)
        except OSError:
            return None
        if found is not None:
            return found
    return None


def reason_unfit(path: str | os.PathLike[str], reader: str) -> str | None:
    """Return why a directory cannot hold weights of the format `reader`, as the rest of a sentence about it; None if it may.

    Args:
        path: the directory.
        reader: the expected format; see `recognize_directory`.
    """
    if not os.path.isdir(path):
        hub = recognize_hub_name(path, "give DIR" if reader == "Hugging Face" else f"`{_importing('DIR')}`")
        what = "it is a file; give the directory that it lies in" if os.path.exists(path) else "there is no such directory"
        other = recognize_file(path) or hub
        return f"it is {other}" if other else what
    if not os.access(path, os.R_OK | os.X_OK):
        return "it cannot be read: permission denied"
    found = recognize_directory(path, reader)
    return f"it is {found}" if found else None


def recognize(path: str | os.PathLike[str]) -> ForeignFormat | None:
    """Recognize what was given instead of a directory of checkpoints: a foreign directory, a file, or a name of the hub."""
    if os.path.isdir(path):
        return recognize_directory(path)
    if os.path.lexists(path):
        return recognize_file(path)
    return recognize_hub_name(path, f"`{_importing('DIR')}`, and give CKPT")


def _own(root: Path) -> ForeignFormat | None:
    """Recognize a checkpoint of this program."""
    if any(path.name == "manifest.json" and path.with_name("state.json").exists() for path in _inside(root)):
        return ForeignFormat("a checkpoint of this program, which needs no import", f"give it to --load: --load {root}")
    return None


def _inside(root: Path) -> list[Path]:
    """Return the entries of a directory and of its directories of iterations."""
    entries = list(root.iterdir())
    steps = [p for p in entries if re.fullmatch(r"iter_\d+|release|(global_)?step[-_]?\d+|weights|checkpoint-\d+", p.name)]
    return [*entries, *(inner for step in sorted(steps)[:100] if step.is_dir() for inner in step.iterdir())]


def _names(paths: Iterable[Path], pattern: str) -> list[Path]:
    """Return the paths whose last part matches the whole pattern, sorted."""
    return sorted(path for path in paths if re.fullmatch(pattern, path.name))


def _deepspeed(root: Path) -> ForeignFormat | None:
    """Recognize a checkpoint of DeepSpeed, with or without ZeRO."""
    if not _names(_inside(root), r"global_step\d+|zero_to_fp32\.py|.*_model_states\.pt|(bf16_)?zero_pp_rank_.*\.pt"):
        return None
    advice = "have its program write a Hugging Face directory DIR (zero_to_fp32.py in it joins the weights)"
    return ForeignFormat("a checkpoint of DeepSpeed", f"{advice}, then `{_importing('DIR')}`")


def _megatron_core(root: Path) -> ForeignFormat | None:
    """Recognize a distributed checkpoint of Megatron-Core or PyTorch."""
    inside = _inside(root)
    shards = _names(inside, r"__\d+_\d+\.distcp|\.metadata")
    core = _names(inside, r"common\.pt")
    if not core and not shards:
        return None
    if core or _names(inside, r"latest_checkpointed_iteration\.txt"):
        save = "have it saved there with --ckpt-format torch (--ckpt-convert-format torch --ckpt-convert-save DIR converts it)"
        advice = f"{save}, then `{_importing_megatron('DIR')}`"
        return ForeignFormat("a distributed checkpoint of Megatron-Core (torch_dist), which is not read here", advice)
    return ForeignFormat(
        "a distributed checkpoint of PyTorch (torch.distributed.checkpoint), which is not read here",
        f"have its program write a Hugging Face directory DIR, then `{_importing('DIR')}`",
    )


def _megatron_lm(root: Path) -> ForeignFormat | None:
    """Recognize a checkpoint of Megatron-LM by its directories of ranks."""
    if not _names(_inside(root), r"mp_rank_\d+(_\d+)*"):
        return None
    return ForeignFormat("a checkpoint of Megatron-LM", f"import it: `{_importing_megatron(root)}`, {THEN}")


def _hub_cache(root: Path) -> ForeignFormat | None:
    """Recognize a directory whose subdirectories hold models: a cache of the hub, or the output of a Trainer."""
    if os.path.lexists(root / "config.json"):
        return None
    kept = {"snapshots/*/config.json": "the Hugging Face hub's cache", "checkpoint-*/config.json": "the Hugging Face Trainer"}
    for pattern, maker in kept.items():
        if found := sorted(root.glob(pattern), key=os.path.getmtime):
            return ForeignFormat(f"a directory of {maker}", f"the model is in {found[-1].parent}")
    return None


def _adapter(root: Path) -> ForeignFormat | None:
    """Recognize a PEFT adapter."""
    if not os.path.lexists(root / "adapter_config.json") or os.path.lexists(root / "config.json"):
        return None
    advice = "merge it with its model by merge_and_unload() and save_pretrained, and import that"
    return ForeignFormat("a PEFT adapter, of weights that change a model's", advice)


def _hugging_face(root: Path) -> ForeignFormat | None:
    """Recognize a Hugging Face directory; the advice depends on the form of its weights."""
    entries = list(root.iterdir())
    weights = _names(entries, r"(model|pytorch_model|tf_model|flax_model)[\w.-]*\.(safetensors|bin|h5|msgpack)(\.index\.json)?")
    if not weights and not _is_hugging_face(root / "config.json"):
        return None
    safe, pickled = _names(weights, r".*safetensors.*"), _names(weights, r".*\.bin.*")
    if weights and not safe:
        held = f"{weights[0].name}, a pickle" if pickled else weights[0].name
        what = f"a Hugging Face directory without safetensors ({held})"
        save = "open it with transformers and save_pretrained it to DIR"
        return ForeignFormat(what, f"{save}, then `{_importing('DIR')}`")
    if pointers := [path for path in safe if is_lfs_pointer(path)]:
        what = f"a Hugging Face directory whose {pointers[0].name} is a pointer of Git LFS"
        return ForeignFormat(what, f"run `git lfs pull` in it, then `{_importing(root)}`")
    return ForeignFormat("a Hugging Face directory", f"import it: `{_importing(root)}`, {THEN}")


def _is_hugging_face(config: Path) -> bool:
    """Return whether a config.json is one of transformers, rather than of a checkpoint of this program."""
    try:
        about = read_json(config)
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and not {"model_type", "architectures"}.isdisjoint(about)


def _single_files(root: Path) -> ForeignFormat | None:
    """Recognize a directory with a single file of all weights, as torch.save and other programs write it."""
    found = _names(root.iterdir(), r".*\.(pt|pth|ckpt|nemo|gguf)")
    if not found:
        return None
    return ForeignFormat(
        f"a directory with {found[0].name}, of another program",
        f"have that write a Hugging Face directory DIR, then `{_importing('DIR')}`",
    )


def _importing(directory: object) -> str:
    return f"python tools/import_hf.py --input {directory} --save CKPT"


def _importing_megatron(directory: object) -> str:
    return f"python tools/import_megatron.py --load {directory} --save CKPT"


Recognizer = Callable[[Path], ForeignFormat | None]
RECOGNIZERS: Mapping[str, tuple[Recognizer, ...]] = MappingProxyType(  # the foreign formats for each expected one
    {
        "ours": (_deepspeed, _megatron_core, _megatron_lm, _hub_cache, _adapter, _hugging_face, _single_files),
        "Megatron-LM": (_own, _deepspeed, _megatron_core, _hub_cache, _adapter, _hugging_face),
        "Hugging Face": (_own, _deepspeed, _megatron_core, _megatron_lm, _hub_cache),
    }
)
