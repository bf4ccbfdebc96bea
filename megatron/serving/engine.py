"""Carry out tasks, one after the other, on all ranks at once: all compute the same tokens, rank 0 hands them on."""

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
from megatron.serving.control import DROP, GO_ON, NOTHING, TASK, Control
from megatron.serving.fields import RequestError
from megatron.serving.task import GenerationTask

EXCHANGE_SECONDS = 0.5  # between two exchanges while no request comes
MAX_WAITING = 256  # requests in the queue
MAX_IDLE = 15.0  # seconds without a sign of the engine while no request runs: it gives one at every exchange


@dataclass(frozen=True)
class TextUpdate:
    """The growth of a text since its last update.

    Attributes:
        index: number of the text in its task.
        tokens: new tokens.
        scores: of as many tokens as are known by now, also of the prompt's.
        end: why the text has ended; empty while it goes on.
    """

    index: int
    tokens: tuple[int, ...]
    scores: tuple[TokenScore, ...]
    end: str


@dataclass(frozen=True)
class TaskResult:
    """The end of a task.

    Attributes:
        beams: of a beam search, best first.
        error: why it ended early; empty where it did not.
        status: of HTTP, for an error.
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
        deliver: gets its updates and then one TaskResult, on the engine's thread.
        dropped: nobody waits for it any more.
    """

    task: GenerationTask
    deliver: Callable[[TextUpdate | TaskResult], None]
    dropped: threading.Event = field(default_factory=threading.Event)


class Engine:
    """One rank's engine. Collective where the model or the control are."""

    def __init__(self, model: Predictor, tokenizer: Tokenizer, control: Control, watch: Watchdog | None = None) -> None:
        self.model, self.tokenizer, self.control, self.watch = model, tokenizer, control, watch or Watchdog()
        self._waiting: queue.Queue[QueuedTask] = queue.Queue(MAX_WAITING)
        self._closed = threading.Event()
        self._progress: tuple[float, str, bool] = (time.monotonic(), "starting", False)

    def trouble(self, patience: float) -> str:
        """Return why requests are not being answered, in words; "" where they are. From any thread.

        patience: seconds that a request may take from one of its tokens to the next.
        """
        if self._closed.is_set():
            return STOPPING.error
        since, what, busy = self._progress
        quiet = time.monotonic() - since
        if quiet <= (patience if busy else MAX_IDLE):
            return ""
        return f"the model has made no progress for {quiet:.0f} s, while {what}"

    def _at(self, what: str, *, busy: bool) -> None:
        """Tell the watchdog, and whoever asks for `trouble`, what happens from now on."""
        self._progress = (time.monotonic(), what, busy)
        if busy:
            self.watch.doing(what)
        else:
            self.watch.waiting(what)

    def check_room(self) -> None:
        """Raise RequestError when as many requests wait as may."""
        if self._waiting.full():
            raise RequestError(f"{self._waiting.maxsize} requests wait already: try again later", status=503)

    def submit(self, pending: QueuedTask) -> None:
        """Queue a task, from one thread of rank 0. It is refused at once when the end has come.

        Raises:
            RequestError: there is no room.
        """
        self.check_room()
        # The engine may close meanwhile, and then nobody would take the task out: so that is looked at afterwards.
        self._waiting.put_nowait(pending)
        if self._closed.is_set():
            self._refuse_all()

    def run(self, asked_to_stop: Callable[[], bool]) -> None:
        """Work until some rank is asked to stop; what waits or runs then is refused. asked_to_stop: of this rank."""
        try:
            while True:
                # Only rank 0 has a queue. All ranks come to the exchange, whether there is a task or not.
                pending = self._next() if self.control.is_leader else None
                self._at("waiting for a request", busy=False)
                word = self.control.exchange(
                    NOTHING if pending is None else TASK,
                    b"" if pending is None else pending.task.to_bytes(),
                    stop=asked_to_stop(),
                )
                if not word.stop and word.command == TASK:
                    done = self._carry_out(GenerationTask.from_bytes(word.payload), pending, asked_to_stop)
                elif word.stop:
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
        """Return the next task that somebody still waits for; None after a while without one."""
        try:
            pending = self._waiting.get(timeout=EXCHANGE_SECONDS)
        except queue.Empty:
            return None
        return None if pending.dropped.is_set() else pending

    def _refuse_all(self) -> None:
        """Refuse all tasks that wait, since the server stops."""
        while True:
            try:
                self._waiting.get_nowait().deliver(STOPPING)
            except queue.Empty:
                return

    def _carry_out(self, task: GenerationTask, pending: QueuedTask | None, asked_to_stop: Callable[[], bool]) -> TaskResult:
        """Carry out a task, on all ranks in step.

        ValueError, such as of a damaged model, comes on all of them at once and ends the task. So does too little memory where
        there is one rank; of several the others wait for this one's part.
        """
        beams: list[Beam] = []
        texts = [GeneratedText.from_prompt(prompt) for prompt in task.prompts]
        told = [(text.start, 0) for text in texts]
        self._at(f"reading the prompts of a request for {len(texts)} texts", busy=True)
        steps = self._beams(task, beams) if task.beam else self._texts(task, texts)
        try:
            for number, grown in enumerate(steps):
                self._at(f"writing token {number + 1} of a request for {len(texts)} texts", busy=True)
                command = GO_ON
                if pending is not None:
                    # The client hears of a token before the other ranks hear that they may go on.
                    _tell(pending, grown, texts, told)
                    command = DROP if pending.dropped.is_set() else GO_ON
                word = self.control.exchange(command, stop=asked_to_stop())
                if word.stop:
                    return STOPPING
                if word.command == DROP:
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
        """Generate the texts of a task; yield, at each step, which of them grew."""
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
        """Run a beam search, and keep its beams in `beams`; no text of the task grows meanwhile."""
        if task.beam is None:
            return
        for found in task.beam.run(self.model, task.prompts[0], max_new_tokens=task.max_new_tokens, banned=task.banned):
            beams[:] = found
            yield []


def _tell(pending: QueuedTask, grown: Sequence[int], texts: Sequence[GeneratedText], told: list[tuple[int, int]]) -> None:
    """Deliver what is new of the texts that grew. told: how many tokens and scores of each have been delivered."""
    for i in grown:
        text, (tokens, scores) = texts[i], told[i]
        told[i] = len(text.tokens), len(text.scores)
        pending.deliver(TextUpdate(i, tuple(text.tokens[tokens:]), tuple(text.scores[scores:]), text.end))
