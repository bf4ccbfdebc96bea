"""Run generation tasks side by side, on all ranks together; rank 0 delivers the tokens to the clients.

Between two passes through the model, rank 0 sends the others the tasks that begin and the numbers of those whose client has
gone. So all ranks have the same texts in every pass, and a task begins at the next pass, however long the others still run.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from megatron.data.tokenizer import Tokenizer
from megatron.inference.beam_search import Beam
from megatron.inference.text_batch import TextBatch, TextGroup
from megatron.inference.texts import GeneratedText, Predictor
from megatron.launch.watchdog import Watchdog
from megatron.serving.control import Control
from megatron.serving.task import MAX_PROMPTS, GenerationTask
from megatron.serving.waiting import QueuedTask, TaskResult, TextUpdate, WaitingTasks

EXCHANGE_SECONDS = 0.5  # time between two exchanges of the ranks while there is no request
MAX_WAITING = 256  # maximum number of requests in the queue
MAX_TEXTS = 2 * MAX_PROMPTS  # maximum number of texts in a pass, each of which has a row of logits
MAX_IDLE = 15.0  # seconds without an exchange, while no request runs, after which the engine counts as stuck
CACHE_TOKENS = 24000  # of the key-value caches of all running tasks together

STOPPING = TaskResult(error="the server is stopping", status=503)
DROPPED = TaskResult(error="nobody waits for this request any more", status=499)
NO_MEMORY = TaskResult(error="the memory does not suffice: ask for less, or start the server with less --max-tokens-to-oom")


@dataclass(eq=False)
class _Running:
    """A running task.

    Attributes:
        task: the task.
        queued: on rank 0, its place in the queue, with its client; None on the others.
        texts: the texts of the task.
        delivered: numbers of tokens and scores that the client has of each text.
        group: the texts in the batch; None for a beam search.
        search: the steps of a beam search; None for texts.
        beams: results of the search so far, best first.
    """

    task: GenerationTask
    queued: QueuedTask | None
    texts: list[GeneratedText]
    delivered: list[tuple[int, int]]
    group: TextGroup | None = None
    search: Iterator[list[Beam]] | None = None
    beams: tuple[Beam, ...] = ()

    def deliver_new(self, grown: Sequence[int]) -> None:
        """Deliver the new tokens and scores of the texts that grew."""
        if self.queued is None:
            return
        for i in grown:
            text, (tokens, scores) = self.texts[i], self.delivered[i]
            self.delivered[i] = len(text.tokens), len(text.scores)
            self.queued.deliver(TextUpdate(i, tuple(text.tokens[tokens:]), tuple(text.scores[scores:]), text.end))


class Engine:
    """Runs the tasks on one rank; collective over the ranks of the model.

    Args:
        model: the model.
        tokenizer: the model's tokenizer.
        control: the exchange between the ranks.
        watch: the job's watchdog.
        cache_tokens: maximum number of tokens in the key-value caches of all running tasks together.
    """

    def __init__(
        self,
        model: Predictor,
        tokenizer: Tokenizer,
        control: Control,
        watch: Watchdog | None = None,
        cache_tokens: int = CACHE_TOKENS,
    ) -> None:
        self.model, self.tokenizer, self.control, self.watch = model, tokenizer, control, watch or Watchdog()
        self.cache_tokens = cache_tokens
        self._waiting = WaitingTasks(MAX_WAITING)
        self._closed = threading.Event()
        self._progress: tuple[float, str, bool] = (time.monotonic(), "starting", False)
        self._batch = TextBatch(model)
        self._running: dict[int, _Running] = {}
        self._begun = 0  # number of tasks that have begun, which names the next one on all ranks

    def trouble(self, patience: float) -> str:
        """Return why requests are not being answered; "" if they are. Can be called from any thread.

        Args:
            patience: seconds that a pass through the model may take.
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
        self._waiting.check_room()

    def submit(self, queued: QueuedTask) -> None:
        """Queue a task, from any thread of rank 0. If the engine has ended, the task is refused at once.

        Raises:
            RequestError: the queue is full.
        """
        # Checked after queueing, since the engine may end in between, and would leave the task in the queue.
        self._waiting.put(queued)
        if self._closed.is_set():
            self._refuse_all()

    def run(self, asked_to_stop: Callable[[], bool]) -> None:
        """Run tasks until some rank is asked to stop; then refuse the running and the queued ones.

        Args:
            asked_to_stop: returns whether this rank was asked to stop.
        """
        try:
            while True:
                if not self._running:
                    self._begin_phase("waiting for a request", busy=False)
                    if self.control.is_leader:
                        self._waiting.wait(EXCHANGE_SECONDS)
                # Only rank 0 has a queue. All ranks take part in the exchange, whether there is news or not.
                begin, news = self._news() if self.control.is_leader else ([], b"")
                heard = self.control.exchange(news, stop=asked_to_stop())
                self._hear(heard.payload, begin)
                if heard.stop:
                    return
                if self._running:
                    self._step()
        finally:
            self._closed.set()
            for running in self._running.values():
                self._deliver(running, STOPPING)
            self._refuse_all()

    def _news(self) -> tuple[list[QueuedTask], bytes]:
        """Return the tasks that begin; and as JSON these and the numbers of the running ones whose client has gone."""
        dropped = [n for n, running in self._running.items() if running.queued is not None and running.queued.dropped.is_set()]
        left = [running.task for n, running in self._running.items() if n not in dropped]
        tokens = self.cache_tokens - sum(task.size for task in left)
        begin = self._waiting.take(tokens, MAX_TEXTS - sum(len(task.prompts) for task in left))
        if not begin and not dropped:
            return [], b""
        return begin, json.dumps({"begin": [asdict(queued.task) for queued in begin], "dropped": dropped}).encode()

    def _hear(self, payload: bytes, begin: Sequence[QueuedTask]) -> None:
        """Begin and drop tasks, on all ranks together. begin: on rank 0 the queue's entries of the new tasks."""
        if not payload:
            return
        news = json.loads(payload)
        for number in news["dropped"]:
            self._end(number, DROPPED)
        for i, fields in enumerate(news["begin"]):
            self._begin(GenerationTask.from_json(fields), begin[i] if begin else None)

    def _begin(self, task: GenerationTask, queued: QueuedTask | None) -> None:
        texts = [GeneratedText.from_prompt(prompt) for prompt in task.prompts]
        running = _Running(task, queued, texts, [(text.start, 0) for text in texts])
        number, self._begun = self._begun, self._begun + 1
        self._running[number] = running
        try:
            if task.beam is not None:
                count, banned = task.max_new_tokens, task.banned
                running.search = task.beam.run(self.model, task.prompts[0], max_new_tokens=count, banned=banned)
                return
            running.group = TextGroup(
                self.model,
                texts,
                max_new_tokens=task.max_new_tokens,
                sampling=task.sampling,
                seed=task.seed,
                stops=task.stops(self.tokenizer),
                banned=task.banned,
                top=task.top,
            )
            self._batch.add(running.group)
        except ValueError as error:
            self._end(number, TaskResult(error=str(error)))

    def _step(self) -> None:
        """Compute one pass of all texts, and one of every beam search, on all ranks together.

        A ValueError, such as that of a damaged model, is raised on all ranks alike, and ends the tasks of the pass. A lack of
        memory on a single rank ends one task. With several ranks it ends the server, since the others wait for this rank.
        """
        texts = sum(running.task.rows for running in self._running.values())
        self._begin_phase(f"computing {texts} texts of {len(self._running)} requests", busy=True)
        if self._batch.groups:
            self._compute_texts({running.group: number for number, running in self._running.items()})
        for number, running in list(self._running.items()):
            if running.search is not None:
                self._search(number, running, running.search)

    def _compute_texts(self, numbers: Mapping[TextGroup | None, int]) -> None:
        """Compute one pass of all texts, and deliver the new tokens. numbers: the number of each group's task."""
        try:
            grown = self._batch.step()
        except ValueError as error:
            for group in list(self._batch.groups):
                self._end(numbers[group], TaskResult(error=str(error)))
            return
        except torch.OutOfMemoryError:
            if self.control.axis.size > 1:
                raise
            # The texts are as they were before the pass, which is repeated without the group that began last.
            self._end(numbers[self._batch.groups[-1]], NO_MEMORY)
            return
        for group, rows in grown:
            self._running[numbers[group]].deliver_new(rows)
            if group.ended:
                self._end(numbers[group], TaskResult(error=group.error))

    def _search(self, number: int, running: _Running, search: Iterator[list[Beam]]) -> None:
        """Compute one step of a beam search."""
        try:
            running.beams = tuple(next(search))
        except StopIteration:
            self._end(number, TaskResult(running.beams))
        except ValueError as error:
            self._end(number, TaskResult(error=str(error)))
        except torch.OutOfMemoryError:
            if self.control.axis.size > 1:
                raise
            self._end(number, NO_MEMORY)

    def _end(self, number: int, result: TaskResult) -> None:
        """End a task, and free its cache."""
        running = self._running.pop(number)
        if running.group is not None:
            self._batch.remove(running.group)
        self._deliver(running, result)

    def _deliver(self, running: _Running, result: TaskResult) -> None:
        if running.queued is not None:
            running.queued.deliver(result)

    def _refuse_all(self) -> None:
        """Refuse all queued tasks, since the server is stopping."""
        for queued in self._waiting.take_all():
            queued.deliver(STOPPING)
