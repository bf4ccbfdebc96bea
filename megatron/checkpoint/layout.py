"""The files of a checkpoint on disk: reading and checking them, and choosing the newest complete checkpoint.

    SAVE/
      latest_checkpointed_iteration.txt      the tracker: the iteration of the last finished save; replaced last
      .latest_checkpointed_iteration.txt.tmp the next tracker; it exists while a save renames its directory
      iter_0000100/
        manifest.json                        every tensor and its pieces, every file with its size and sha256
        config.json                          the run's merged configuration
        state.json                           the scalars of all parts: iteration, consumed samples, ...
        shard_00000.safetensors              tensors, one file for each rank that wrote any
        tokenizer/                           the tokenizer's own files, and those kept from Hugging Face

Tensors have global names that begin with their part: `model.layers.0.attention.qkv.weight`. If a tensor is saved in several
pieces, the key of each piece ends with its start: `model.head.weight@64,0`. Nothing else depends on the parallel layout of the
run that saved, and nothing is pickled.

Which checkpoint is the latest follows from these files alone, never from time stamps, which copying loses: see `trial_order`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron.checkpoint.manifest import Manifest, Piece, TensorRecord, parse_strict_json
from megatron.checkpoint.storage import hash_file
from megatron.files.regular import read_bytes, read_text

__all__ = [
    "CheckpointError", "CheckpointNotFound", "Manifest", "NewestCheckpoint", "Piece", "TensorRecord", "TrialOrder",
    "check_bytes", "check_sizes", "checked_path", "describe_iterations", "describe_other_iterations", "directory_name",
    "iteration_directories", "latest_iteration", "newest_complete", "read_config", "read_json", "read_manifest", "read_state",
    "read_tracker", "trial_order", "verify",
]  # fmt: skip

MANIFEST, CONFIG, STATE, TOKENIZER = "manifest.json", "config.json", "state.json", "tokenizer"
TRACKER = "latest_checkpointed_iteration.txt"
NEXT_TRACKER = f".{TRACKER}.tmp"
NO_MANIFEST = f"it has no {MANIFEST}, so it is unfinished or not a checkpoint of this program"
DIRECTORY = re.compile(r"iter_(\d{7,15})(\.replaced)?")
MAX_TRACKER_BYTES = 1000
MAX_JSON_BYTES = 1 << 30  # the manifest of a thousand ranks has a few hundred million bytes
NONE_DAMAGED: Mapping[Path, str] = MappingProxyType({})


class CheckpointError(Exception):
    """A checkpoint cannot be found, read or written. The message names the path and what is wrong with it."""


class CheckpointNotFound(CheckpointError):
    """The checkpoint does not exist; nothing is damaged."""


def directory_name(iteration: int) -> str:
    """Return the name of the directory of an iteration's checkpoint."""
    return f"iter_{iteration:07d}"


def iteration_directories(root: Path) -> dict[int, Path]:
    """Return the checkpoint directories under `root` by iteration, complete or not, in ascending order."""
    found: dict[int, Path] = {}
    # A second save of iteration 100 renames the first to `iter_0000100.replaced`. That name sorts after `iter_0000100`, so it
    # is used only until the second save is finished.
    for path in sorted(root.iterdir(), key=lambda p: p.name) if root.is_dir() else []:
        match = DIRECTORY.fullmatch(path.name)
        if match and path.is_dir():
            found.setdefault(int(match[1]), path)
    return dict(sorted(found.items()))


def checked_path(directory: Path, name: str) -> Path:
    """Return the path of a checkpoint's file after checking it.

    CheckpointError when it does not exist, is not a regular file, or is a link that leads outside the directory.
    """
    path = directory / name
    try:
        # Links within the directory are allowed: some storage systems store equal files once. Reading a pipe would never end.
        real = path.resolve(strict=True)
        if not real.is_relative_to(directory.resolve()):
            raise CheckpointError(f"{path}: it is a link that leads outside the checkpoint, to {real}")
        if not stat.S_ISREG(real.stat().st_mode):
            raise CheckpointError(f"{path}: it is not a regular file")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return path


def _read_json_bytes(path: Path) -> bytes:
    """Read a JSON file without parsing it. OSError when it is larger than MAX_JSON_BYTES."""
    return read_bytes(path, MAX_JSON_BYTES)


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a checkpoint directory. CheckpointError if it is missing or unusable."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no such directory")
    if not os.path.lexists(path):
        raise CheckpointError(f"{directory}: {NO_MANIFEST}")
    try:
        return Manifest.from_text(_read_json_bytes(checked_path(directory, MANIFEST)).decode("utf-8"))
    except KeyError as error:
        raise CheckpointError(f"{path}: not a usable manifest: {error} is missing") from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a usable manifest: {error}") from error


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Compare the size of every file with the manifest.

    CheckpointError for the first file that is missing, leads outside the directory or has another size, and if the directory is
    named after another iteration.
    """
    for name, record in manifest.files.items():
        size = checked_path(directory, name).stat().st_size
        if size != record.bytes:
            raise CheckpointError(f"{directory / name}: {size} bytes, the manifest says {record.bytes}")
    match = DIRECTORY.fullmatch(directory.resolve().name)
    if match and int(match[1]) != manifest.iteration:
        raise CheckpointError(f"{directory / MANIFEST}: it is of iteration {manifest.iteration}")


def check_bytes(
    directory: Path, manifest: Manifest, names: Iterable[str], report: Callable[[str], None] = lambda progress: None
) -> None:
    """Compare the bytes of files with the sha256 in the manifest.

    Args:
        directory: the checkpoint's directory.
        manifest: the checkpoint's manifest.
        names: names of the files to compare, as the manifest lists them.
        report: called with a line of progress after every chunk.

    Raises:
        CheckpointError: for the first file that cannot be read or differs.
    """
    for name in names:
        path = checked_path(directory, name)
        try:
            same = hash_file(path, report) == manifest.files[name]
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        if not same:
            raise CheckpointError(f"{path}: its bytes do not match the manifest's sha256")


def verify(directory: Path) -> Manifest:
    """Compare every byte of a checkpoint with its manifest, in one process. CheckpointError names the first bad file."""
    manifest = read_manifest(directory)
    check_sizes(directory, manifest)
    check_bytes(directory, manifest, manifest.files)
    return manifest


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a checkpoint, after comparing it with the manifest. CheckpointError names the file."""
    record = read_manifest(directory).files.get(name)
    if record is None:
        raise CheckpointError(f"{directory / MANIFEST}: it lists no {name}")
    path = checked_path(directory, name)
    try:
        raw = _read_json_bytes(path)  # read once for the hash and the parser: the file might change between two reads
        if hashlib.sha256(raw).hexdigest() != record.sha256:
            raise CheckpointError(f"{path}: its bytes do not match the manifest's sha256")
        value = parse_strict_json(raw)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """Read the merged configuration of the run that saved the checkpoint."""
    return read_json(directory, CONFIG)


def read_state(directory: Path) -> dict[str, dict[str, Any]]:
    """Read the scalars of every part, by the part's name."""
    state = read_json(directory, STATE)
    for part, values in state.items():
        if not isinstance(values, dict):
            raise CheckpointError(f"{directory / STATE}: {part}: expected a JSON object")
    return state


def read_tracker(root: Path) -> int | None:
    """Read the iteration in the tracker of `root`; None if there is no tracker. CheckpointError if it is unusable."""
    text = _tracker_text(root, TRACKER)
    if text is None:
        return None
    text = text.strip()
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise CheckpointError(
            f"{root / TRACKER}: expected an iteration number, found {text[:40]!r}. {describe_iterations(root)}"
        )
    return int(text)


def _tracker_text(root: Path, name: str) -> str | None:
    if not os.path.lexists(root / name):
        return None
    try:
        return read_text(checked_path(root, name), MAX_TRACKER_BYTES)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{root / name}: {error}") from error


def latest_iteration(root: Path) -> int | None:
    """Return the iteration of the last finished save; None if there was none. CheckpointError if the tracker is unusable.

    It is the tracker's iteration, unless a save died after renaming its directory and before replacing the tracker.
    """
    untracked = _untracked_iteration(root)
    return read_tracker(root) if untracked is None else untracked


def _untracked_iteration(root: Path) -> int | None:
    """Return the iteration of a finished save that died before it replaced the tracker; None if there is none."""
    # A save writes the next tracker, renames its directory, then replaces the tracker. If it died between the last two steps,
    # both the next tracker and the directory exist.
    try:
        text = _tracker_text(root, NEXT_TRACKER) or ""
    except CheckpointError:
        return None
    if not re.fullmatch(r"[0-9]{1,15}\n", text):  # without the newline it was not written to its end
        return None
    return int(text) if (root / directory_name(int(text)) / MANIFEST).is_file() else None


def describe_iterations(root: Path) -> str:
    """Return a sentence that lists the iterations under `root`, for a user who must choose one."""
    numbers = list(iteration_directories(root))
    if not numbers:
        return "No iter_ directory is there"
    listed = ", ".join(map(str, numbers[-10:]))
    return f"Iterations there: {'..., ' if len(numbers) > 10 else ''}{listed}; choose one with --load-iteration"


@dataclass(frozen=True)
class TrialOrder:
    """Order in which the checkpoints of a directory are tried.

    paths: the preferred checkpoint, then the ones to fall back to. lines: problems of the tracker, for the user.
    later: iterations after the tracker's, which are tried last. note: a line for the user if the tracker differs from the
    newest iteration, else None.
    """

    paths: tuple[Path, ...]
    lines: tuple[str, ...]
    later: tuple[int, ...]
    note: str | None


def trial_order(root: Path) -> TrialOrder:
    """Return the order in which every program and tool tries the checkpoints under `root`.

    First the one that the tracker names, then earlier iterations from the newest to the oldest, then later iterations in the
    same direction. Without a tracker all iterations are tried from the newest to the oldest.
    """
    present, untracked = iteration_directories(root), _untracked_iteration(root)
    tracked, lines = None, []
    try:
        tracked = read_tracker(root)
    except CheckpointError as error:
        lines.append(str(error))
    latest = tracked if untracked is None else untracked
    if latest is not None and latest not in present:
        lines.append(f"{root / TRACKER}: it names iteration {latest}, which is not there")
    # A user rewinds a run by writing an earlier iteration into the tracker, as in Megatron-LM. The later iterations were then
    # given up, so they are only the last resort.
    later = tuple(number for number in present if latest is not None and number > latest)
    earlier = [number for number in present if number not in later]
    # A second save of an iteration may be damaged while the first one, renamed to .replaced, is intact.
    paths = (
        present[number].with_name(directory_name(number) + suffix)
        for number in (*reversed(earlier), *reversed(later))
        for suffix in ("", ".replaced")
    )
    note = _tracker_note(root, tracked, untracked, later)
    return TrialOrder(tuple(path for path in paths if path.is_dir()), tuple(lines), later, note)


def _tracker_note(root: Path, tracked: int | None, untracked: int | None, later: tuple[int, ...]) -> str | None:
    """Return a line on how the tracker differs from the newest iteration, and which one is used; None if they agree."""
    if untracked is not None and tracked is not None:
        taken = f"the save of {untracked} was finished after it and is used"
        return (
            f"{root / TRACKER} names iteration {tracked}; {taken}: to go back give --load-iteration, or remove {NEXT_TRACKER}"
        )
    if not later:
        return None
    listed = f"{', '.join(map(str, later[-5:]))} {'is' if len(later) == 1 else 'are'} later, and not taken"
    latest = tracked if untracked is None else untracked
    return f"{root / TRACKER} names iteration {latest}; {listed}: give --load-iteration, or write its number into the file"


@dataclass(frozen=True)
class NewestCheckpoint:
    """Result of looking for the newest complete checkpoint.

    path: its directory; None if there is none. skipped: a line for each checkpoint that was skipped. note: as in `TrialOrder`,
    but None if the checkpoint is one of `later`. empty: the directory has neither checkpoints nor a tracker.
    """

    path: Path | None
    skipped: tuple[str, ...]
    note: str | None = None
    empty: bool = False

    @property
    def lines(self) -> tuple[str, ...]:
        """Lines for the user: the skipped checkpoints and the note."""
        return (*(f"passed over: {line}" for line in self.skipped), *([self.note] if self.note else []))


def newest_complete(root: Path, damaged: Mapping[Path, str] = NONE_DAMAGED) -> NewestCheckpoint:
    """Find the first complete checkpoint in `trial_order`: all file sizes match the manifest, and the bytes of the small files.

    damaged: checkpoints already known to be damaged, with the reason.
    """
    # The tensor files are not read here: that takes minutes, and the ranks share the work when they load.
    order = trial_order(root)
    skipped = [f"{path}: a save that was interrupted" for path in sorted(root.glob(".iter_*.tmp"))]
    skipped += order.lines
    for path in order.paths:
        try:
            if path in damaged:
                raise CheckpointError(damaged[path])
            manifest = read_manifest(path)
            check_sizes(path, manifest)
            check_bytes(path, manifest, (name for name in manifest.files if not name.endswith(".safetensors")))
        except (CheckpointError, OSError) as error:
            skipped.append(str(error))
            continue
        return NewestCheckpoint(path, tuple(skipped), None if manifest.iteration in order.later else order.note)
    return NewestCheckpoint(None, tuple(skipped), empty=not order.paths and not os.path.lexists(root / TRACKER))


def describe_other_iterations(directory: Path) -> str:
    """Return a sentence that lists the iterations beside `directory`, for a user who chose it although it is damaged."""
    match = DIRECTORY.fullmatch(directory.resolve().name)
    numbers = [n for n in iteration_directories(directory.resolve().parent) if not match or n != int(match[1])]
    listed = ", ".join(map(str, numbers[-10:]))
    return (
        f"Other iterations there: {'..., ' if len(numbers) > 10 else ''}{listed}" if numbers else "No other iteration is there"
    )


def holds_weights_alone(directory: Path) -> bool:
    """Return whether a checkpoint contains only weights, as an import writes it: no optimizer, counters or data position."""
    return read_state(directory).keys() == {"model"}
