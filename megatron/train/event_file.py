"""Write TensorBoard's event file (protocol buffers in TFRecords) from the training thread itself.

torch's SummaryWriter writes in a thread of its own. When the disk is full, that thread dies with a traceback and leaves a
partial record, at which TensorBoard stops reading.
"""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

from megatron.files.side import SideFile

FLUSH_SECONDS = 10.0  # an event added this long after the last flush causes the next one


class EventFile:
    """An event file of scalars for TensorBoard.

    Args:
        directory: the directory of the file.
        queue_size: number of events that are collected before they are written together.
        purge_step: from this step on, TensorBoard hides the points of earlier files in the directory; None hides nothing.

    Raises:
        ImportError: the package `tensorboard` is not installed.
    """

    def __init__(self, directory: Path, queue_size: int, purge_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._record_writer = Event, Summary, RecordWriter
        self._queue_size = queue_size
        now = time.time()
        name = f"events.out.tfevents.{now:010.0f}.{os.uname().nodename}.{os.getpid()}.{time.monotonic_ns()}"
        version_event = {"wall_time": now, "file_version": "brain.Event:2"}
        self._file = SideFile(directory / name, "TensorBoard's events", self._record(version_event))
        self._events: list[bytes] = []
        self._flushed_at = time.monotonic()
        if purge_step is not None:
            self._events.append(self._record(version_event | {"step": purge_step}))
            session_start = SessionLog(status=SessionLog.START)
            self._events.append(self._record({"wall_time": now, "step": purge_step, "session_log": session_start}))
        self.flush()

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add one point of a curve.

        Args:
            tag: name of the curve.
            value: the y value.
            step: the x value, an iteration or a number of samples.
        """
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=value)])
        self._events.append(self._record({"wall_time": time.time(), "step": step, "summary": summary}))
        # Events are written together, since each write may wait for a file server.
        if len(self._events) >= self._queue_size or time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the collected events. Those that the disk refuses are written with the next flush."""
        self._file.add(*self._events)
        self._events.clear()
        self._flushed_at = time.monotonic()

    def _record(self, values: dict[str, Any]) -> bytes:
        """Return an event as a TFRecord: length, data, and a checksum of each."""
        data = io.BytesIO()
        self._record_writer(data).write(self._event(**values).SerializeToString())
        return data.getvalue()
