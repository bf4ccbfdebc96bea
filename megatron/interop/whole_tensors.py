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

MODEL_PREFIX = "model."  # of the names of weights; other tensors are the optimizer's


@dataclass(frozen=True)
class WholeTensors:
    """A `Checkpointable` of whole tensors by their global names, all of them in this process."""

    tensors: Mapping[str, Tensor]

    def shards(self) -> Iterator[Shard]:
        for name, tensor in self.tensors.items():
            shape = tuple(tensor.shape)
            yield Shard(name, shape, Part.whole(shape), frozenset(), tensor)

    def scalars(self) -> dict[str, Any]:
        return {}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        """Do nothing, since there are no scalars."""


def write_weights(
    root: Path, iteration: int, config: RunSettings, weights: Mapping[str, Tensor], assets: Assets = None
) -> Path:
    """Write a checkpoint that holds only weights, and make it the latest of its directory.

    Args:
        root: the directory of checkpoints.
        iteration: the checkpoint's iteration.
        config: the resolved settings to store with the weights.
        weights: the whole tensors under our global names.
        assets: further files to store, such as the tokenizer's.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: the checkpoint cannot be written.
    """
    return save(root, iteration, {"model": WholeTensors(weights)}, Mesh.single(), config=to_json(config), assets=assets)


def check_save_root(root: Path, iteration: int) -> None:
    """Raise CheckpointError if a new checkpoint in `root` would become the latest before those of a run.

    A `root` whose only checkpoint has this iteration and only weights is accepted, so that an import can be repeated.
    """
    present = iteration_directories(root)
    with suppress(CheckpointError):  # a damaged checkpoint is not replaced
        if list(present) == [iteration] and holds_weights_alone(present[iteration]):
            return
    if not present:
        return
    listed = ", ".join(map(str, list(present)[-5:]))
    raise CheckpointError(
        f"--save {root} holds checkpoints already, of iteration {listed}: one of iteration {iteration} there would become "
        "the latest, and a run that resumes would continue from it. Give --save a new directory, or move the checkpoints away"
    )


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Read every weight in an iter_ directory, whole, by its global name. CheckpointError if the checkpoint is damaged."""
    manifest = verify(directory)
    names = [name for name in manifest.tensors if name.startswith(MODEL_PREFIX)]
    if not names:
        raise CheckpointError(f"{directory}: it holds no model")
    return {name.removeprefix(MODEL_PREFIX): read_tensor(directory, manifest, name) for name in names}
