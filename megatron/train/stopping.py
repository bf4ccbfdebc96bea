"""Let all ranks agree, in one small collective after every step, on whether to stop or to save.

A run is asked to stop by a signal to any rank, by --exit-duration-in-mins, by the time limit of its SLURM job, or by a stop
file. It stops before a time limit, early enough for one more step and for a save as long as the longest one so far.
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

MIN_SLURM_SECONDS = 5.0  # the run stops at the latest so long before the time limit of its SLURM job
STOP_FILE = "stop"  # default name, in --save


@dataclass(frozen=True)
class Request:
    """Agreement of all ranks at a boundary between steps.

    Attributes:
        stop: the reason why the run stops here; None while it continues.
        outside: the reason comes from outside the command: a signal or SLURM.
        save: a checkpoint is due, because of the stop or of --save-interval-mins.
    """

    stop: str | None = None
    outside: bool = False
    save: bool = False


class Stopping:
    """Lets all ranks agree on whether to stop or to save; all must call `ask` at the same boundaries.

    Args:
        config: contains the time limits, the intervals and the stop file.
        mesh: the parallel axes.
        device: the device on which the votes are reduced.
        signals: the signals that ask this rank to stop.
        began: start of the program, `time.monotonic()`.
        save_seconds: returns the duration of the longest save so far, in seconds.
        environ: the environment variables, with SLURM_JOB_END_TIME.
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
        # A stop file in --save is meant for the run that trains there, not for an evaluation.
        save = None if config.eval.skip_train else config.checkpoint.save
        default = None if save is None else Path(save) / STOP_FILE
        self.stop_file = default if config.batch.stop_file is None else Path(config.batch.stop_file)
        self._save_minutes = config.checkpoint.save_interval_mins
        self._saved_at = time.monotonic()
        self._step_seconds = 0.0

    def ask(self, step_seconds: float | None = None, *, save_due: bool = False) -> Request:
        """Return what all ranks agree on now. Collective over the world.

        Args:
            step_seconds: duration of the step that ends here; None between the steps of an evaluation.
            save_due: a checkpoint will be written here anyway.
        """
        self._step_seconds = self._step_seconds if step_seconds is None else step_seconds
        votes = torch.tensor(self._votes(save_due), dtype=torch.int64, device=self._device)  # [5]
        # The maximum, since the vote of one rank is enough, and so that all ranks get the same reason.
        signal_vote, late, slurm_late, file_exists, save = map(int, all_reduce(votes, self._mesh.world, "max").tolist())
        reasons = [
            (signal_vote, self._decode_signal(signal_vote), True),
            (late, f"--exit-duration-in-mins {self._minutes:g}" if self._minutes is not None else "", False),
            (slurm_late, "the time limit of the SLURM job is near", True),
            (file_exists, f"the stop file {self.stop_file}", False),
        ]
        for vote, why, outside in reasons:
            if vote:
                return Request(why, outside, save=True)
        return Request(save=bool(save))

    def saved(self) -> None:
        """Restart the interval of --save-interval-mins, after a checkpoint was written or its background save begun."""
        self._saved_at = time.monotonic()

    def acknowledge(self) -> None:
        """Record that the run is ending. The first rank removes the stop file, which would also stop the next start."""
        self._signals.answered = True
        if self.stop_file is not None and self._mesh.rank == 0:
            with suppress(OSError):
                self.stop_file.unlink()

    def _votes(self, save_due: bool) -> list[int]:
        """Return this rank's votes, of which the maximum over the ranks counts: signal, two limits, stop file, save."""
        first, now = self._mesh.rank == 0, time.monotonic()
        # 1.5, since the final save may be slower than any before. One more save may come before it: one in the background, or
        # the one that is due here.
        saves = 1.5 + (1.0 if save_due or self._async else 0.0)
        # The next step and the saves must end before a limit.
        margin = self._step_seconds + saves * self._save_seconds()
        late = self._end is not None and now + margin > self._end
        slurm_late = self._slurm_end is not None and time.time() + max(margin, MIN_SLURM_SECONDS) > self._slurm_end
        file_exists = first and self.stop_file is not None and os.path.isfile(self.stop_file)
        save = first and self._save_minutes is not None and now - self._saved_at >= 60.0 * self._save_minutes
        return [self._encode_signal(), int(late), int(slurm_late), int(file_exists), int(save)]

    def _encode_signal(self) -> int:
        """Encode the signal and this rank in a number, which is largest on the lowest rank; 0 if there was no signal."""
        names = [number.name for number in STOP_SIGNALS]
        name = self._signals.name
        # Lower ranks have larger numbers, so the maximum over the ranks is that of the lowest rank with a signal.
        return 0 if name is None else (self._mesh.world.size - self._mesh.rank) * len(names) + names.index(name)

    def _decode_signal(self, vote: int) -> str:
        """Return the signal and the rank of a vote, for the message."""
        from_last, index = divmod(vote, len(STOP_SIGNALS))
        return f"{STOP_SIGNALS[index].name} to rank {self._mesh.world.size - from_last}"
