"""Write whole tensors as a checkpoint, as imports do, and read a checkpoint as whole tensors, as exports do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.layout import CheckpointError, holds_weights_alone, iteration_directories, verify
from megatron.checkpoint.load import read_tensor
from megatron.checkpoint.save import save
from megatron.checkpoint.save_plan import Assets
from megatron.config.command_line.saved import to_json
from megatron.config.schema import RunSettings
from megatron.mesh.mesh import Mesh
from megatron.parallel.spec import Part, Shard

MODEL_PREFIX = "model."  # before the names of weights; others are of the optimizer


@dataclass(frozen=True)
class WholeTensors:
    """The `Checkpointable` of tensors by their global names, each whole on this one process."""

    tensors: Mapping[str, Tensor]

    def shards(self) -> Iterator[Shard]:
        for name, tensor in self.tensors.items():
            shape = tuple(tensor.shape)
            yield Shard(name, shape, Part.whole(shape), frozenset(), tensor)

    def scalars(self) -> dict[str, Any]:
        return {}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        """There are none."""


def write_weights(
    root: Path, iteration: int, config: RunSettings, weights: Mapping[str, Tensor], assets: Assets = None
) -> Path:
    """Write a checkpoint that holds weights alone, and make it the latest of its directory.

    Args:
        root: directory of checkpoints.
        iteration: of the checkpoint.
        config: resolved.
        weights: under our global names, whole.
        assets: the tokenizer's files.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: when the disk refuses.
    """
    return save(root, iteration, {"model": WholeTensors(weights)}, Mesh.single(), config=to_json(config), assets=assets)


def check_save_root(root: Path, iteration: int) -> None:
    """Raise CheckpointError where a checkpoint of this iteration, written into `root`, would hide others or wind a run back.

    An import alone may be repeated: nothing but the same weights is replaced.
    """
    present = iteration_directories(root)
    with suppress(CheckpointError):  # a damaged checkpoint is no import that may be repeated
        if list(present) == [iteration] and holds_weights_alone(present[iteration]):
            return
    if not present:
        return
    listed = f"{', '.join(map(str, list(present)[-5:]))}"
    raise CheckpointError(
        f"--save {root} holds checkpoints already, of iteration {listed}: one of iteration {iteration} there would be taken "
        "for the latest, and a run that goes on would be wound back to it. Give --save a new directory, or move away what is "
        "there"
    )


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Read every weight in an iter_ directory, whole, by its global name. CheckpointError when a byte is not as written."""
    manifest = verify(directory)
    names = [name for name in manifest.tensors if name.startswith(MODEL_PREFIX)]
    if not names:
        raise CheckpointError(f"{directory}: it holds no model")
    return {name.removeprefix(MODEL_PREFIX): read_tensor(directory, manifest, name) for name in names}
