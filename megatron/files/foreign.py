"""Recognize files and directories of other programs by their content, so that error messages name them and give advice."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from megatron.files.regular import open_regular, read_json

HEAD_BYTES = 1 << 10  # number of bytes read to recognize a file; the farthest signature, of tar, is at byte 257
LFS_SIGNATURE = b"version https://git-lfs."
# First bytes and name of each compression that readers of text decompress. Readers of other files reject a compressed file
# and advise the user to run the command-line program of `UNPACKERS`.
COMPRESSION_SIGNATURES = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstandard"),
    *((bytes([n]) + b"\x2a\x4d\x18", "zstandard") for n in range(0x50, 0x60)),  # a skippable frame
    *((b"BZh%d" % level + begin, "bzip2") for level in range(1, 10) for begin in (b"1AY&SY", b"\x17rE8P\x90")),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x5d\x00\x00", "lzma"),
)
UNPACKERS = MappingProxyType({"gzip": "gzip", "zstandard": "zstd", "bzip2": "bzip2", "xz": "xz", "lzma": "xz"})
JSONL_ADVICE = 'write one JSON object per line, such as {"text": "..."}'
PANDAS_ADVICE = (
    f"{JSONL_ADVICE}: `python -c \"import pandas; pandas.read_%s('FILE').to_json('FILE.jsonl', orient='records', lines=True)\"`"
)
UNPACK_ADVICE = "unpack it and name the files in it"
ICONV_ADVICE = "convert it: `iconv -f %s -t UTF-8 FILE > NEW`"
# Formats that no reader accepts: the signature's offset, the signature (magic bytes), the description of the format, and the
# advice, in which FILE stands for the file's name. A signature of only letters and digits may also begin a text, so it counts
# only if the head also contains bytes that no text contains.
SIGNATURES = (
    (0, LFS_SIGNATURE, "a pointer of Git LFS, in place of the file itself", "run `git lfs pull` where it was cloned"),
    (0, b"PAR1", "a Parquet file", PANDAS_ADVICE % "parquet"),
    (0, b"ARROW1", "an Arrow file", PANDAS_ADVICE % "feather"),
    (
        0,
        b"\xff\xff\xff\xff",
        "an Arrow stream, as the package datasets writes",
        f"{JSONL_ADVICE}: `Dataset.to_json`",
    ),
    (0, b"ORC", "an ORC file", PANDAS_ADVICE % "orc"),
    (0, b"Obj\x01", "an Avro file", JSONL_ADVICE),
    (0, b"\x89HDF", "an HDF5 file", JSONL_ADVICE),
    (0, b"SQLite format 3\x00", "an SQLite database", JSONL_ADVICE),
    (0, b"%PDF-", "a PDF file", "extract its text"),
    (0, b"GGUF", "a GGUF file, of llama.cpp", "get the model's safetensors instead"),
    (0, b"MMIDIDX\x00", "the index of an already preprocessed dataset", "pass the dataset's prefix to --data-path"),
    (0, b"PK\x03\x04", "a zip archive", UNPACK_ADVICE),
    (0, b"PK\x05\x06", "an empty zip archive", UNPACK_ADVICE),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK_ADVICE),
    (0, b"Rar!\x1a\x07", "a RAR archive", UNPACK_ADVICE),
    (257, b"ustar", "a tar archive", UNPACK_ADVICE),
    (0, b"\x04\x22\x4d\x18", "compressed with LZ4", "unpack it: `lz4 -d FILE`"),
    (0, b"\xff\x06\x00\x00sNaPpY", "compressed with Snappy", "unpack it"),
    (0, b"\x1f\x9d", "compressed with compress", "unpack it: `gzip -d FILE`"),
    (0, b"LZIP", "compressed with lzip", "unpack it: `lzip -d FILE`"),
    (0, b"\xff\xfe\x00\x00", "text in UTF-32, not UTF-8", ICONV_ADVICE % "UTF-32"),
    (0, b"\x00\x00\xfe\xff", "text in UTF-32, not UTF-8", ICONV_ADVICE % "UTF-32"),
    (0, b"\xff\xfe", "text in UTF-16, not UTF-8", ICONV_ADVICE % "UTF-16"),
    (0, b"\xfe\xff", "text in UTF-16, not UTF-8", ICONV_ADVICE % "UTF-16"),
)
# UTF-16 without a byte-order mark: which of the first four bytes (two Latin characters) are zero. This is valid UTF-8, too.
UTF16_WITHOUT_BOM: Mapping[tuple[bool, ...], str] = MappingProxyType(
    {(False, True, False, True): "UTF-16LE", (True, False, True, False): "UTF-16BE"}
)
MAX_ZEROS = 0.2  # maximum fraction of zero bytes in a text

# Names on the Hugging Face hub: owner/model; the oldest models have no owner.
NAME_WITH_OWNER = re.compile(r"(?<![\w.-])[\w-][\w.-]*/[\w-][\w.-]*")
NAME_WITHOUT_OWNER = re.compile(
    r"(gpt2(-medium|-large|-xl)?|distilgpt2|openai-gpt|bert-(base|large)-.*|distilbert-.*|roberta-(base|large)|"
    r"albert-.*|electra-.*|t5-(small|base|large|3b|11b)|xlnet-.*|xlm-.*|megatron-bert-.*)"
)
LOCAL_DIRECTORIES = re.compile(  # common names of local directories
    r"(runs?|checkpoints?|ckpts?|data(sets?)?|out(puts?)?|saved?|saves|results?|exps?|experiments|logs?|te?mp|work(space)?|scratch|"
    r"models?|weights|pretrained|tests?|home|root|mnt|examples|tools|tasks)"
)
LOAD_ADVICE = "then --load CKPT (with --finetune to start training from it)"


@dataclass(frozen=True)
class ForeignFormat:
    """The format of a file or directory that another program wrote.

    Attributes:
        what: the format's description: `a Parquet file`.
        advice: what the user should do with it.
    """

    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}"


LFS_POINTER = ForeignFormat(*next((what, advice) for _, signature, what, advice in SIGNATURES if signature == LFS_SIGNATURE))


def detect_compression(head: bytes) -> str | None:
    """Return the name of the compression of a file with these first bytes; None if it is not compressed."""
    return next((compression for signature, compression in COMPRESSION_SIGNATURES if head.startswith(signature)), None)


def recognize_bytes(head: bytes, file: str | os.PathLike[str] = "FILE", *, text: bool = True) -> ForeignFormat | None:
    """Recognize a foreign file by its first bytes.

    Args:
        head: the file's first HEAD_BYTES bytes.
        file: the file's name, for the commands in the advice.
        text: the file is expected to be text, so many zero bytes make it foreign.

    Returns:
        The file's format; None if it is not recognized.
    """
    name = os.fspath(file)
    if compression := detect_compression(head):
        return ForeignFormat(f"compressed with {compression}", f"unpack it: `{UNPACKERS[compression]} -d {name}`")
    # No text contains bytes below 9, the tab character.
    binary = any(byte < 9 for byte in head)
    for offset, signature, what, advice in SIGNATURES:
        if head[offset:].startswith(signature) and (binary or not signature.isalnum()):
            return ForeignFormat(what, advice.replace("FILE", name))
    if text and (encoding := UTF16_WITHOUT_BOM.get(tuple(byte == 0 for byte in head[:4]))):
        return ForeignFormat("text in UTF-16, not UTF-8", (ICONV_ADVICE % encoding).replace("FILE", name))
    if text and head.count(0) > MAX_ZEROS * len(head):
        return ForeignFormat("not text: many of its bytes are zeros", "give a text file in UTF-8")
    return None


def recognize_file(path: str | os.PathLike[str]) -> ForeignFormat | None:
    """Recognize a file by its first bytes, as `recognize_bytes` does; None if it cannot be read."""
    try:
        with open_regular(path) as file:
            return recognize_bytes(file.read(HEAD_BYTES), path, text=False)
    except OSError:
        return None


def is_lfs_pointer(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a pointer of Git LFS, which takes the place of a large file until `git lfs pull`."""
    try:
        with open_regular(path) as file:
            return file.read(len(LFS_SIGNATURE)) == LFS_SIGNATURE
    except OSError:
        return False


def recognize_hub_name(name: str | os.PathLike[str], then: str = "give DIR") -> ForeignFormat | None:
    """Recognize the name of a model on the Hugging Face hub that was given instead of a local path.

    A path whose first directory exists, or has a common name of a local directory, is not considered a name on the hub.

    Args:
        name: what the user gave.
        then: the step after downloading the model to DIR, for the advice.

    Returns:
        The description of the name; None if it is not a name on the hub, or if it exists locally.
    """
    text = os.fspath(name)
    model = re.sub(r"^(https?://)?(www\.)?(huggingface\.co|hf\.co)/|^hf://", "", text)
    is_url = model != text
    model = "/".join(model.split("/")[:2]) if is_url else model
    if os.path.lexists(text):
        return None
    if not is_url:
        owner = model.split("/")[0]
        is_local = os.path.lexists(owner) or LOCAL_DIRECTORIES.fullmatch(owner.lower()) or "." in owner
        has_owner = NAME_WITH_OWNER.fullmatch(model) and not is_local
        if not has_owner and not NAME_WITHOUT_OWNER.fullmatch(model):
            return None
    download = f"huggingface-cli download {model} --local-dir DIR"
    return ForeignFormat("a name on the Hugging Face hub, from which nothing is downloaded", f"`{download}`, then {then}")


def recognize_directory(path: str | os.PathLike[str], expected_format: str = "native") -> ForeignFormat | None:
    """Recognize a directory of weights in another than the expected format; None for any other directory or an unreadable one.

    Args:
        path: the directory.
        expected_format: the format that the caller reads: `native`, `Megatron-LM` or `Hugging Face`.
    """
    root = Path(path)
    for recognizer in RECOGNIZERS[expected_format]:
        try:
            found = recognizer(root)
        except OSError:
            return None
        if found is not None:
            return found
    return None


def why_not_weights(path: str | os.PathLike[str], expected_format: str) -> str | None:
    """Return why a path is not a directory of weights in the expected format; None if it may be one.

    Args:
        path: the path that should be such a directory.
        expected_format: as for `recognize_directory`.

    Returns:
        A clause about the path for an error message, such as `it is a file; ...`.
    """
    if not os.path.isdir(path):
        hub = recognize_hub_name(path, "give DIR" if expected_format == "Hugging Face" else f"`{_import_hf_command('DIR')}`")
        if found := recognize_file(path) or hub:
            return f"it is {found}"
        return "it is a file; give its directory" if os.path.exists(path) else "there is no such directory"
    if not os.access(path, os.R_OK | os.X_OK):
        return "it cannot be read: permission denied"
    found = recognize_directory(path, expected_format)
    return f"it is {found}" if found else None


def recognize(path: str | os.PathLike[str]) -> ForeignFormat | None:
    """Recognize what the user gave instead of a directory of checkpoints: a foreign directory, a file, or a name on the hub."""
    if os.path.isdir(path):
        return recognize_directory(path)
    if os.path.lexists(path):
        return recognize_file(path)
    return recognize_hub_name(path, f"`{_import_hf_command('DIR')}`, and give CKPT")


def _native(root: Path) -> ForeignFormat | None:
    """Recognize a checkpoint of this program."""
    if any(path.name == "manifest.json" and path.with_name("state.json").exists() for path in _entries(root)):
        return ForeignFormat("a checkpoint of this program, which needs no import", f"give it to --load: --load {root}")
    return None


def _entries(root: Path) -> list[Path]:
    """Return the entries of a directory, and those of its subdirectories of single iterations or steps."""
    entries = list(root.iterdir())
    steps = [p for p in entries if re.fullmatch(r"iter_\d+|release|(global_)?step[-_]?\d+|weights|checkpoint-\d+", p.name)]
    return [*entries, *(inner for step in sorted(steps)[:100] if step.is_dir() for inner in step.iterdir())]


def _matching(paths: Iterable[Path], pattern: str) -> list[Path]:
    """Return the paths whose file name matches the whole pattern, sorted."""
    return sorted(path for path in paths if re.fullmatch(pattern, path.name))


def _deepspeed(root: Path) -> ForeignFormat | None:
    """Recognize a checkpoint of DeepSpeed, with or without ZeRO."""
    if not _matching(_entries(root), r"global_step\d+|zero_to_fp32\.py|.*_model_states\.pt|(bf16_)?zero_pp_rank_.*\.pt"):
        return None
    advice = "save it as a Hugging Face directory DIR with the program that wrote it (its zero_to_fp32.py merges the shards)"
    return ForeignFormat("a checkpoint of DeepSpeed", f"{advice}, then `{_import_hf_command('DIR')}`")


def _megatron_core(root: Path) -> ForeignFormat | None:
    """Recognize a distributed checkpoint of Megatron-Core or PyTorch."""
    inside = _entries(root)
    shards = _matching(inside, r"__\d+_\d+\.distcp|\.metadata")
    core = _matching(inside, r"common\.pt")
    if not core and not shards:
        return None
    if core or _matching(inside, r"latest_checkpointed_iteration\.txt"):
        save = "save it with --ckpt-format torch, or convert it with --ckpt-convert-format torch --ckpt-convert-save DIR"
        advice = f"{save}, then `{_import_megatron_command('DIR')}`"
        return ForeignFormat("a distributed checkpoint of Megatron-Core (torch_dist), which is not read here", advice)
    return ForeignFormat(
        "a distributed checkpoint of PyTorch (torch.distributed.checkpoint), which is not read here",
        f"save it as a Hugging Face directory DIR with the program that wrote it, then `{_import_hf_command('DIR')}`",
    )


def _megatron_lm(root: Path) -> ForeignFormat | None:
    """Recognize a checkpoint of Megatron-LM by its mp_rank_ directories."""
    if not _matching(_entries(root), r"mp_rank_\d+(_\d+)*"):
        return None
    return ForeignFormat("a checkpoint of Megatron-LM", f"import it: `{_import_megatron_command(root)}`, {LOAD_ADVICE}")


def _parent_of_models(root: Path) -> ForeignFormat | None:
    """Recognize the parent of model directories: one model of the hub's cache, or the output directory of a Trainer."""
    if os.path.lexists(root / "config.json"):
        return None
    makers = {
        "snapshots/*/config.json": "the Hugging Face hub's cache",
        "checkpoint-*/config.json": "the Hugging Face Trainer",
    }
    for pattern, maker in makers.items():
        if configs := sorted(root.glob(pattern), key=os.path.getmtime):
            return ForeignFormat(f"a directory of {maker}", f"the latest model is in {configs[-1].parent}")
    return None


def _adapter(root: Path) -> ForeignFormat | None:
    """Recognize a PEFT adapter."""
    if not os.path.lexists(root / "adapter_config.json") or os.path.lexists(root / "config.json"):
        return None
    advice = "merge it into its model with merge_and_unload(), write that with save_pretrained(), and import it"
    return ForeignFormat("a PEFT adapter, which has only changes to a model's weights", advice)


def _hugging_face(root: Path) -> ForeignFormat | None:
    """Recognize a Hugging Face directory; the advice depends on the file format of its weights."""
    entries = list(root.iterdir())
    weights = _matching(
        entries, r"(model|pytorch_model|tf_model|flax_model)[\w.-]*\.(safetensors|bin|h5|msgpack)(\.index\.json)?"
    )
    if not weights and not _is_hugging_face(root / "config.json"):
        return None
    safe, pickled = _matching(weights, r".*safetensors.*"), _matching(weights, r".*\.bin.*")
    if weights and not safe:
        first = f"{weights[0].name}, a pickle" if pickled else weights[0].name
        what = f"a Hugging Face directory without safetensors ({first})"
        save = "load it with transformers' from_pretrained() and write it to DIR with save_pretrained()"
        return ForeignFormat(what, f"{save}, then `{_import_hf_command('DIR')}`")
    if pointers := [path for path in safe if is_lfs_pointer(path)]:
        what = f"a Hugging Face directory whose {pointers[0].name} is a pointer of Git LFS"
        return ForeignFormat(what, f"run `git lfs pull` in it, then `{_import_hf_command(root)}`")
    return ForeignFormat("a Hugging Face directory", f"import it: `{_import_hf_command(root)}`, {LOAD_ADVICE}")


def _is_hugging_face(config: Path) -> bool:
    """Return whether transformers wrote this config.json, rather than this program, whose checkpoints have one as well."""
    try:
        settings = read_json(config)
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and not {"model_type", "architectures"}.isdisjoint(settings)


def _weight_files(root: Path) -> ForeignFormat | None:
    """Recognize a directory with weight files of other programs, such as those of torch.save, NeMo or llama.cpp."""
    found = _matching(root.iterdir(), r".*\.(pt|pth|ckpt|nemo|gguf)")
    if not found:
        return None
    return ForeignFormat(
        f"a directory with {found[0].name}, which another program wrote",
        f"save the model as a Hugging Face directory DIR with that program, then `{_import_hf_command('DIR')}`",
    )


def _import_hf_command(directory: object) -> str:
    return f"python tools/import_hf.py --input {directory} --save CKPT"


def _import_megatron_command(directory: object) -> str:
    return f"python tools/import_megatron.py --load {directory} --save CKPT"


Recognizer = Callable[[Path], ForeignFormat | None]
RECOGNIZERS: Mapping[str, tuple[Recognizer, ...]] = MappingProxyType(  # expected format: recognizers of all other formats
    {
        "native": (_deepspeed, _megatron_core, _megatron_lm, _parent_of_models, _adapter, _hugging_face, _weight_files),
        "Megatron-LM": (_native, _deepspeed, _megatron_core, _parent_of_models, _adapter, _hugging_face),
        "Hugging Face": (_native, _deepspeed, _megatron_core, _megatron_lm, _parent_of_models),
    }
)
