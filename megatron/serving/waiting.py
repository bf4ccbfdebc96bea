"""The queue of tasks that wait for room in the key-value cache."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron.inference.beam_search import Beam
from megatron.inference.texts import TokenScore
from megatron.serving.fields import RequestError
from megatron.serving.task import GenerationTask

MAX_OVERTAKEN = 64  # maximum number of later tasks that begin before one that is too large for the free room


@dataclass(frozen=True)
class TextUpdate:
    """The new part of a text since its last update.

    Attributes:
        index: number of the text in its task.
        tokens: new tokens.
        scores: new scores, which include those of the prompt's tokens.
        end: `stop` or `length` when the text has ended; otherwise empty.
    """

    index: int
    tokens: tuple[int, ...]
    scores: tuple[TokenScore, ...]
    end: str


@dataclass(frozen=True)
class TaskResult:
    """The end of a task.

    Attributes:
        beams: results of a beam search, best first.
        error: the reason why the task ended early; empty if it did not.
        status: the HTTP status of an error.
    """

    beams: tuple[Beam, ...] = ()
    error: str = ""
    status: int = 500


@dataclass(eq=False)
class QueuedTask:
    """A task that waits or runs.

    Attributes:
        task: the task.
        deliver: called with its updates and then one TaskResult, on the engine's thread.
        dropped: set when the client no longer waits for it.
        overtaken: number of later tasks that began before it.
    """

    task: GenerationTask
    deliver: Callable[[TextUpdate | TaskResult], None]
    dropped: threading.Event = field(default_factory=threading.Event)
    overtaken: int = 0


class WaitingTasks:
    """A queue to which any thread adds tasks, and from which the engine takes them.

    Args:
        most: maximum number of queued tasks.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._tasks: list[QueuedTask] = []
        self._changed = threading.Condition()

    def check_room(self) -> None:
        """Raise RequestError if the queue is full."""
        if len(self._tasks) >= self.most:
            raise RequestError(f"{self.most} requests wait already: try again later", status=503)

    def put(self, queued: QueuedTask) -> None:
        """Queue a task. RequestError if the queue is full."""
        with self._changed:
            self.check_room()
            self._tasks.append(queued)
            self._changed.notify()

    def wait(self, seconds: float) -> None:
        """Wait until a task is queued, at most this long."""
        with self._changed:
            if not self._tasks:
                self._changed.wait(seconds)

    def take_all(self) -> list[QueuedTask]:
        """Remove and return all tasks."""
        with self._changed:
            tasks, self._tasks = self._tasks, []
            return tasks

    def take(self, tokens: int, texts: int) -> list[QueuedTask]:
        """Remove and return the tasks that can begin; also remove those whose client no longer waits.

        Tasks begin in the order of their arrival, but one that is too large for the free room is overtaken by smaller ones, up
        to `MAX_OVERTAKEN` times, so that no task waits for ever.

        Args:
            tokens: free tokens of the key-value cache.
            texts: maximum number of further texts.
        """
        chosen, left = list[QueuedTask](), list[QueuedTask]()
        with self._changed:
            for queued in self._tasks:
                task = queued.task
                if queued.dropped.is_set():
                    continue
                may_pass = all(before.overtaken < MAX_OVERTAKEN for before in left)
                if task.size <= tokens and len(task.prompts) <= texts and may_pass:
                    tokens, texts = tokens - task.size, texts - len(task.prompts)
                    chosen.append(queued)
                    for before in left:
                        before.overtaken += 1
                else:
                    left.append(queued)
            self._tasks = left
        return chosen
