"""Run generation tasks one after the other, on all ranks together; rank 0 delivers the tokens to the clients."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megatron.data.tokenizer import Tokenizer
from megatron.inference.beam_search import Beam
from megatron.inference.generate import GeneratedText, Predictor, TokenScore, extend_texts
from megatron.launch.watchdog import Watchdog
from megatron.serving.control import CONTINUE, DROP, NOTHING, TASK, Control
from megatron.serving.fields import RequestError
from megatron.serving.task import GenerationTask

EXCHANGE_SECONDS = 0.5  # time between two exchanges of the ranks while there is no request
MAX_WAITING = 256  # maximum number of requests in the queue
MAX_IDLE = 15.0  # seconds without an exchange, while no request runs, after which the engine counts as stuck


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


STOPPING = TaskResult(error="the server is stopping", status=503)


@dataclass(frozen=True)
class QueuedTask:
    """A task that waits or runs.

    Attributes:
        task: the task.
        deliver: called with its updates and then one TaskResult, on the engine's thread.
        dropped: set when the client no longer waits for it.
    """

    task: GenerationTask
    deliver: Callable[[TextUpdate | TaskResult], None]
    dropped: threading.Event = field(default_factory=threading.Event)


class Engine:
    """Runs the tasks on one rank; collective over the ranks of the model."""

    def __init__(self, model: Predictor, tokenizer: Tokenizer, control: Control, watch: Watchdog | None = None) -> None:
        self.model, self.tokenizer, self.control, self.watch = model, tokenizer, control, watch or Watchdog()
        self._waiting: queue.Queue[QueuedTask] = queue.Queue(MAX_WAITING)
        self._closed = threading.Event()
        self._progress: tuple[float, str, bool] = (time.monotonic(), "starting", False)

    def trouble(self, patience: float) -> str:
        """Return why requests are not being answered; "" if they are. Can be called from any thread.

        Args:
            patience: seconds that a request may take from one of its tokens to the next.
        """
        if self._closed.is_set():
            return STOPPING.error
        since, what, busy = self._progress
        quiet = time.monotonic() - since
        if quiet <= (patience if busy else MAX_IDLE):
            return ""
        return f"the model has made no progress for {quiet:.0f} s, while {what}"

    def _begin_phase(self, what: str, *, busy: bool) -> None:
        """Record the current phase for the watchdog and for `trouble`."""
        self._progress = (time.monotonic(), what, busy)
        if busy:
            self.watch.doing(what)
        else:
            self.watch.waiting(what)

    def check_room(self) -> None:
        """Raise RequestError if the queue is full."""
        if self._waiting.full():
            raise RequestError(f"{self._waiting.maxsize} requests wait already: try again later", status=503)

    def submit(self, pending: QueuedTask) -> None:
        """Queue a task, from one thread of rank 0. If the engine has ended, the task is refused at once.

        Raises:
            RequestError: the queue is full.
        """
        self.check_room()
        # Checked after queueing, since the engine may end in between, and would leave the task in the queue.
        self._waiting.put_nowait(pending)
        if self._closed.is_set():
            self._refuse_all()

    def run(self, asked_to_stop: Callable[[], bool]) -> None:
        """Run tasks until some rank is asked to stop; then refuse the current and the queued ones.

        Args:
            asked_to_stop: returns whether this rank was asked to stop.
        """
        try:
            while True:
                # Only rank 0 has a queue. All ranks take part in the exchange, whether there is a task or not.
                pending = self._next() if self.control.is_leader else None
                self._begin_phase("waiting for a request", busy=False)
                message = self.control.exchange(
                    NOTHING if pending is None else TASK,
                    b"" if pending is None else pending.task.to_bytes(),
                    stop=asked_to_stop(),
                )
                if not message.stop and message.command == TASK:
                    done = self._run_task(GenerationTask.from_bytes(message.payload), pending, asked_to_stop)
                elif message.stop:
                    done = STOPPING
                else:
                    continue
                if pending is not None:
                    pending.deliver(done)
                if done is STOPPING:
                    return
        finally:
            self._closed.set()
            self._refuse_all()

    def _next(self) -> QueuedTask | None:
        """Return the next task whose client still waits; None after EXCHANGE_SECONDS without one."""
        try:
            pending = self._waiting.get(timeout=EXCHANGE_SECONDS)
        except queue.Empty:
            return None
        return None if pending.dropped.is_set() else pending

    def _refuse_all(self) -> None:
        """Refuse all queued tasks, since the server is stopping."""
        while True:
            try:
                self._waiting.get_nowait().deliver(STOPPING)
            except queue.Empty:
                return

    def _run_task(self, task: GenerationTask, pending: QueuedTask | None, asked_to_stop: Callable[[], bool]) -> TaskResult:
        """Run a task, on all ranks together.

        A ValueError, such as that of a damaged model, is raised on all ranks alike, and ends only the task. So does a lack of
        memory on a single rank. With several ranks it ends the server, since the others wait for this rank's part.
        """
        beams: list[Beam] = []
        texts = [GeneratedText.from_prompt(prompt) for prompt in task.prompts]
        delivered = [(text.start, 0) for text in texts]  # numbers of tokens and scores that the client has of each text
        self._begin_phase(f"reading the prompts of a request for {len(texts)} texts", busy=True)
        steps = self._beams(task, beams) if task.beam else self._texts(task, texts)
        try:
            for number, grown in enumerate(steps):
                self._begin_phase(f"writing token {number + 1} of a request for {len(texts)} texts", busy=True)
                command = CONTINUE
                if pending is not None:
                    # Delivered before the exchange, in which this rank may have to wait for the others.
                    _deliver_new(pending, grown, texts, delivered)
                    command = DROP if pending.dropped.is_set() else CONTINUE
                message = self.control.exchange(command, stop=asked_to_stop())
                if message.stop:
                    return STOPPING
                if message.command == DROP:
                    return TaskResult(error="nobody waits for this request any more", status=499)
        except ValueError as error:
            return TaskResult(error=str(error))
        except torch.OutOfMemoryError:
            if self.control.axis.size > 1:
                raise
            return TaskResult(
                error="the memory does not suffice: ask for less, or start the server with less --max-tokens-to-oom"
            )
        return TaskResult(tuple(beams))

    def _texts(self, task: GenerationTask, texts: list[GeneratedText]) -> Iterator[list[int]]:
        """Generate the texts of a task; after each step, yield the indices of those that grew."""
        return extend_texts(
            self.model,
            texts,
            max_new_tokens=task.max_new_tokens,
            sampling=task.sampling,
            seed=task.seed,
            stops=task.stops(self.tokenizer),
            banned=task.banned,
            top=task.top,
        )

    def _beams(self, task: GenerationTask, beams: list[Beam]) -> Iterator[list[int]]:
        """Run a beam search, and store its results in `beams`; yield an empty list after each step, since no text grows."""
        if task.beam is None:
            return
        for found in task.beam.run(self.model, task.prompts[0], max_new_tokens=task.max_new_tokens, banned=task.banned):
            beams[:] = found
            yield []


def _deliver_new(
    pending: QueuedTask, grown: Sequence[int], texts: Sequence[GeneratedText], delivered: list[tuple[int, int]]
) -> None:
    """Deliver the new tokens and scores of the texts that grew, and update their numbers in `delivered`."""
    for i in grown:
        text, (tokens, scores) = texts[i], delivered[i]
        delivered[i] = len(text.tokens), len(text.scores)
        pending.deliver(TextUpdate(i, tuple(text.tokens[tokens:]), tuple(text.scores[scores:]), text.end))
