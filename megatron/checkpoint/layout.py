"""The files of a checkpoint on disk: reading and checking them, and choosing the latest checkpoint that is whole.

    SAVE/
      latest_checkpointed_iteration.txt      the tracker: the number of the last one that was finished; replaced last
      .latest_checkpointed_iteration.txt.tmp the next tracker, while a save gives the directory its name
      iter_0000100/
        manifest.json                        every tensor and its pieces, every file with its size and sha256
        config.json                          the merged configuration of the run
        state.json                           the small values of all parts: iteration, consumed samples, ...
        shard_00000.safetensors              plain tensors, one file per rank that wrote some
        tokenizer/                           the tokenizer's own files, and what came with it from Hugging Face

Tensors have global names with the part in front: `model.layers.0.attention.qkv.weight`. A tensor that was cut into pieces
carries each piece's start in the file's key: `model.head.weight@64,0`. The layout of the run that saved appears nowhere
else, and nothing is pickled.

Which checkpoint is the latest follows from these files alone, never from time stamps, which a copy loses: see `trial_order`.
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
MAX_JSON_BYTES = 1 << 30  # bytes of a JSON file; the manifest of a thousand ranks has a few hundred million
NONE_DAMAGED: Mapping[Path, str] = MappingProxyType({})


class CheckpointError(Exception):
    """A checkpoint cannot be found, read or written. The message names the path and what is wrong with it."""


class CheckpointNotFound(CheckpointError):
    """There is no checkpoint where one was looked for; nothing is damaged."""


def directory_name(iteration: int) -> str:
    """Return the name of the directory of an iteration's checkpoint."""
    return f"iter_{iteration:07d}"


def iteration_directories(root: Path) -> dict[int, Path]:
    """Return every checkpoint directory under `root` by its iteration, whole or not, in ascending order."""
    found: dict[int, Path] = {}
    # `iter_0000100.replaced` is the one that a second save of the same iteration set aside. It sorts behind its successor,
    # and so counts only while that is not there yet.
    for path in sorted(root.iterdir(), key=lambda p: p.name) if root.is_dir() else []:
        match = DIRECTORY.fullmatch(path.name)
        if match and path.is_dir():
            found.setdefault(int(match[1]), path)
    return dict(sorted(found.items()))


def checked_path(directory: Path, name: str) -> Path:
    """Return the path of a checkpoint's file, which was looked at.

    CheckpointError when it is not there, no regular file, or a link to outside the directory.
    """
    path = directory / name
    try:
        # Links within the directory are followed: some storages keep one copy of equal files. A pipe would be read for ever.
        real = path.resolve(strict=True)
        if not real.is_relative_to(directory.resolve()):
            raise CheckpointError(f"{path}: it is a link that leads outside the checkpoint, to {real}")
        if not stat.S_ISREG(real.stat().st_mode):
            raise CheckpointError(f"{path}: it is not a regular file")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return path


def _read_json_bytes(path: Path) -> bytes:
    """Read a file that is to be JSON. OSError when it is too large to be one of ours."""
    return read_bytes(path, MAX_JSON_BYTES)


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a checkpoint directory. CheckpointError names the file and what is wrong with it."""
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

    CheckpointError for the first that is not there, leads elsewhere, or has another size; and for a directory whose name says
    another iteration.
    """
    for name, record in manifest.files.items():
        size = checked_path(directory, name).stat().st_size
        if size != record.bytes:
            raise CheckpointError(f"{directory / name}: {size} bytes, the manifest says {record.bytes}")
    match = DIRECTORY.fullmatch(directory.resolve().name)
    if match and int(match[1]) != manifest.iteration:
        raise CheckpointError(f"{directory / MANIFEST}: it is of iteration {manifest.iteration}")


def check_bytes(
    directory: Path, manifest: Manifest, names: Iterable[str], tell: Callable[[str], None] = lambda what: None
) -> None:
    """Read files to the end, and compare their bytes with the manifest.

    Args:
        directory: of the checkpoint.
        manifest: the checkpoint's.
        names: of the files, which the manifest lists.
        tell: is called with a line about how far it has come, after every chunk.

    Raises:
        CheckpointError: for the first file whose bytes are not those that were written.
    """
    for name in names:
        path = checked_path(directory, name)
        try:
            same = hash_file(path, tell) == manifest.files[name]
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        if not same:
            raise CheckpointError(f"{path}: its bytes do not match the manifest's sha256")


def verify(directory: Path) -> Manifest:
    """Compare every byte with the manifest. CheckpointError names the first file that differs. One process reads it all."""
    manifest = read_manifest(directory)
    check_sizes(directory, manifest)
    check_bytes(directory, manifest, manifest.files)
    return manifest


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """Read one of a checkpoint's JSON files, compared with the manifest. CheckpointError names the file."""
    record = read_manifest(directory).files.get(name)
    if record is None:
        raise CheckpointError(f"{directory / MANIFEST}: it lists no {name}")
    path = checked_path(directory, name)
    try:
        raw = _read_json_bytes(path)  # read once, then hashed and parsed: the file may change meanwhile
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
    """Read the iteration that the tracker of `root` names; None when there is no tracker. CheckpointError for a bad one."""
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
    """Return the iteration of the last save that was finished; None when there was none. CheckpointError for a bad tracker.

    It is the tracker's, unless a save died after its directory had its name and before the tracker was replaced.
    """
    unannounced = _unannounced(root)
    return read_tracker(root) if unannounced is None else unannounced


def _unannounced(root: Path) -> int | None:
    """Return the iteration of a whole save that the tracker could not name any more; None where there is none."""
    # A save writes the next tracker, names its directory, replaces the tracker. Dead between the last two, it left both.
    try:
        text = _tracker_text(root, NEXT_TRACKER) or ""
    except CheckpointError:
        return None
    if not re.fullmatch(r"[0-9]{1,15}\n", text):  # without the line's end it is torn
        return None
    return int(text) if (root / directory_name(int(text)) / MANIFEST).is_file() else None


def describe_iterations(root: Path) -> str:
    """Say in words which iterations are under `root`, for somebody who must choose one."""
    numbers = list(iteration_directories(root))
    if not numbers:
        return "No iter_ directory is there"
    listed = ", ".join(map(str, numbers[-10:]))
    return f"Iterations there: {'..., ' if len(numbers) > 10 else ''}{listed}; choose one with --load-iteration"


@dataclass(frozen=True)
class TrialOrder:
    """Order in which the checkpoints of a directory are tried.

    paths: the one to take, then those to fall back to. lines: for a user, what is odd about the directory.
    later: the iterations that come last, though they are newer. note: says that the tracker and the newest iteration differ,
    and that none of `later` is taken; None where they do not differ.
    """

    paths: tuple[Path, ...]
    lines: tuple[str, ...]
    later: tuple[int, ...]
    note: str | None


def trial_order(root: Path) -> TrialOrder:
    """Return the order in which every program and tool tries the checkpoints under `root`.

    First the one that was finished last, as the tracker says, then older ones from the newest on, then later ones. Without a
    tracker the newest is the first.
    """
    present, unannounced = iteration_directories(root), _unannounced(root)
    tracked, lines = None, []
    try:
        tracked = read_tracker(root)
    except CheckpointError as error:
        lines.append(str(error))
    latest = tracked if unannounced is None else unannounced
    if latest is not None and latest not in present:
        lines.append(f"{root / TRACKER}: it names iteration {latest}, which is not there")
    # Whoever writes an older number into the tracker goes back, as in Megatron-LM: later iterations are of a run that was wound
    # back. They come last: better than nothing, where all others are lost.
    later = tuple(number for number in present if latest is not None and number > latest)
    earlier = [number for number in present if number not in later]
    # A second save of an iteration may be damaged where the first, which it has set aside, is whole.
    paths = (
        present[number].with_name(directory_name(number) + end)
        for number in (*reversed(earlier), *reversed(later))
        for end in ("", ".replaced")
    )
    note = _tracker_note(root, tracked, unannounced, later)
    return TrialOrder(tuple(path for path in paths if path.is_dir()), tuple(lines), later, note)


def _tracker_note(root: Path, tracked: int | None, unannounced: int | None, later: tuple[int, ...]) -> str | None:
    """Say that the tracker and the newest iteration differ, and what is taken; None where they do not."""
    if unannounced is not None and tracked is not None:
        taken = f"the save of {unannounced} after it was finished, and is taken"
        return (
            f"{root / TRACKER} names iteration {tracked}; {taken}: to go back give --load-iteration, or remove {NEXT_TRACKER}"
        )
    if not later:
        return None
    listed = f"{', '.join(map(str, later[-5:]))} {'is' if len(later) == 1 else 'are'} later, and not taken"
    latest = tracked if unannounced is None else unannounced
    return f"{root / TRACKER} names iteration {latest}; {listed}: give --load-iteration, or write its number into the file"


@dataclass(frozen=True)
class NewestCheckpoint:
    """Newest whole checkpoint of a directory, as `path`; None where there is none. skipped: a line for each passed over.

    note: as in `TrialOrder`, None where one of `later` was taken. empty: no checkpoint was ever finished here, so there is
    nothing to lose.
    """

    path: Path | None
    skipped: tuple[str, ...]
    note: str | None = None
    empty: bool = False

    @property
    def lines(self) -> tuple[str, ...]:
        """Lines for the user: what was passed over, and what is odd about the directory."""
        return (*(f"passed over: {line}" for line in self.skipped), *([self.note] if self.note else []))


def newest_complete(root: Path, damaged: Mapping[Path, str] = NONE_DAMAGED) -> NewestCheckpoint:
    """Find the first checkpoint in `trial_order` that is whole: all sizes are right, and the bytes of small files.

    damaged: those that are known to be, and why.
    """
    # The bytes of tensors are not read here: that takes minutes, and all ranks share it when they load.
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
    """Say in words which iterations lie beside `directory`, for somebody whose choice it is and who finds it damaged."""
    match = DIRECTORY.fullmatch(directory.resolve().name)
    numbers = [n for n in iteration_directories(directory.resolve().parent) if not match or n != int(match[1])]
    listed = ", ".join(map(str, numbers[-10:]))
    return (
        f"Other iterations there: {'..., ' if len(numbers) > 10 else ''}{listed}" if numbers else "No other iteration is there"
    )


def holds_weights_alone(directory: Path) -> bool:
    """Return whether a checkpoint was imported: it has no optimizer, no counters and no position in the data."""
    return read_state(directory).keys() == {"model"}
