"""Agreement of all ranks to stop or to save, at every boundary of a step, in one small collective.

A run is asked to stop by a signal to any one rank, by --exit-duration-in-mins, by the time limit of its SLURM job, or by a stop
file. The two limits leave room for what is still to come: one step, and the save as long as the longest one so far.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.config.schema import RunConfig
from megatron.launch.signals import STOP_SIGNALS, StopSignals
from megatron.mesh.mesh import Mesh
from megatron.parallel.collectives import all_reduce

SLURM_FLOOR = 5.0  # seconds before SLURM's limit that are left in any case: it counts from before the program's start
STOP_FILE = "stop"


@dataclass(frozen=True)
class Request:
    """Agreement of all ranks at a boundary between steps.

    Attributes:
        stop: why the run stops here; None while it goes on.
        outside: the reason comes from outside of the command, which wanted more.
        save: a checkpoint is due, for the stop or by --save-interval-mins.
    """

    stop: str | None = None
    outside: bool = False
    save: bool = False


class Stopping:
    """Collects the reasons to stop or to save; all ranks ask it at the same boundaries.

    Args:
        config: limits, intervals and the stop file.
        mesh: the parallel axes.
        device: where the votes are reduced.
        signals: what asks this rank to stop.
        began: start of the program, `time.monotonic()`.
        save_seconds: returns the seconds of the longest save so far.
        environ: of the process.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        device: torch.device,
        signals: StopSignals,
        *,
        began: float,
        save_seconds: Callable[[], float] = lambda: 0.0,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._mesh, self._device, self._signals, self._save_seconds = mesh, device, signals, save_seconds
        self._minutes, self._async = config.batch.exit_duration_in_mins, config.checkpoint.async_save
        self._end = None if self._minutes is None else began + 60.0 * self._minutes
        end_time = environ.get("SLURM_JOB_END_TIME", "")
        self._slurm_end = float(end_time) if end_time.isdigit() else None  # seconds since 1970
        folder = None if config.eval.skip_train else config.checkpoint.save  # there it is meant for who trains
        default = None if folder is None else Path(folder) / STOP_FILE
        self.stop_file = default if config.batch.stop_file is None else Path(config.batch.stop_file)
        self._between = config.checkpoint.save_interval_mins
        self._saved = time.monotonic()
        self._step = 0.0

    def ask(self, step_seconds: float | None = None, *, save_due: bool = False) -> Request:
        """Return what all ranks agree on now. Collective over the world.

        Args:
            step_seconds: how long the step took that ends here; None between the steps of an evaluation.
            save_due: a checkpoint will be written here anyway.
        """
        self._step = self._step if step_seconds is None else step_seconds
        wishes = torch.tensor(self._wishes(save_due), dtype=torch.int64, device=self._device)  # [5]
        # The maximum: one rank that wants to stop is enough, and all see the same reason.
        signal_, late, slurm_late, file_seen, save = map(int, all_reduce(wishes, self._mesh.world, "max").tolist())
        reasons = [
            (signal_, self._decoded(signal_), True),
            (late, f"--exit-duration-in-mins {self._minutes:g}" if self._minutes is not None else "", False),
            (slurm_late, "the time limit of the SLURM job is near", True),
            (file_seen, f"the stop file {self.stop_file}", False),
        ]
        for wish, why, outside in reasons:
            if wish:
                return Request(why, outside, save=True)
        return Request(save=bool(save))

    def saved(self) -> None:
        """Note that a checkpoint was just written, or begun."""
        self._saved = time.monotonic()

    def acknowledge(self) -> None:
        """Note that the run has stopped: the first rank removes the stop file, or the next start would stop as well."""
        self._signals.answered = True
        if self.stop_file is not None and self._mesh.rank == 0:
            with suppress(OSError):
                self.stop_file.unlink()

    def _wishes(self, save_due: bool) -> list[int]:
        """Return what this rank sees, as numbers of which the largest counts."""
        first, now = self._mesh.rank == 0, time.monotonic()
        # A save in the background is waited for before the last one; one that is due here is written before the next step.
        saves = 1.5 + (1.0 if save_due or self._async else 0.0)
        margin = self._step + saves * self._save_seconds()
        # Limits are met early by what must still fit: the next step and the saves.
        late = self._end is not None and now + margin > self._end
        slurm_late = self._slurm_end is not None and time.time() + max(margin, SLURM_FLOOR) > self._slurm_end
        file_seen = first and self.stop_file is not None and os.path.isfile(self.stop_file)
        save = first and self._between is not None and now - self._saved >= 60.0 * self._between
        return [self._encoded(), int(late), int(slurm_late), int(file_seen), int(save)]

    def _encoded(self) -> int:
        """Encode the signal and this rank in a number, largest on the lowest rank; 0 without a signal."""
        names = [number.name for number in STOP_SIGNALS]
        name = self._signals.name
        return 0 if name is None else (self._mesh.world.size - self._mesh.rank) * len(names) + names.index(name)

    def _decoded(self, wish: int) -> str:
        from_last, which = divmod(wish, len(STOP_SIGNALS))
        return f"{STOP_SIGNALS[which].name} to rank {self._mesh.world.size - from_last}"
