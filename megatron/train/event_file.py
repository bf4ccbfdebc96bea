"""TensorBoard's file of events (TFRecords of protocol buffers), appended by the training thread itself.

torch's SummaryWriter gives the file to a thread, which dies with a traceback when the disk is full and leaves half a record, at
which TensorBoard ends.
"""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

from megatron.files.side import SideFile

FLUSH_SECONDS = 10.0  # between two additions to the file, where events come at all


class EventFile:
    """Scalars for TensorBoard, in a file of their own.

    Args:
        directory: where the file is made.
        queue: events that wait until they are written together.
        purge: TensorBoard hides what earlier files of the directory say from this step on; None hides nothing.

    Raises:
        ImportError: the package `tensorboard` is not installed.
    """

    def __init__(self, directory: Path, queue: int, purge: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._writer, self._queue = Event, Summary, RecordWriter, queue
        now = time.time()
        name = f"events.out.tfevents.{now:010.0f}.{os.uname().nodename}.{os.getpid()}.{time.monotonic_ns()}"
        version = {"wall_time": now, "file_version": "brain.Event:2"}
        self._file = SideFile(directory / name, "TensorBoard's events", self._record(version))
        self._events: list[bytes] = []
        self._flushed = time.monotonic()
        if purge is not None:
            self._events.append(self._record(version | {"step": purge}))
            start = SessionLog(status=SessionLog.START)
            self._events.append(self._record({"wall_time": now, "step": purge, "session_log": start}))
        self.flush()

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add one point of a curve.

        Args:
            tag: name of the curve.
            value: of the point.
            step: its position, an iteration or a number of samples.
        """
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=value)])
        self._events.append(self._record({"wall_time": time.time(), "step": step, "summary": summary}))
        # Few and large writes: each one may wait for a file server.
        if len(self._events) >= self._queue or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the events that wait, as far as the disk takes them."""
        self._file.add(*self._events)
        self._events.clear()
        self._flushed = time.monotonic()

    def _record(self, values: dict[str, Any]) -> bytes:
        """Return an event as a TFRecord: length, data, and a checksum of each."""
        data = io.BytesIO()
        self._writer(data).write(self._event(**values).SerializeToString())
        return data.getvalue()
