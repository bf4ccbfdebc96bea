"""Continuous batching: every text is the one that it is alone, whoever comes and goes beside it, on every layout."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import pytest
import torch
from random_gpts import as_pipeline, build_random_gpt, save_model
from ranks import on_ranks
from reference import GPT2, LLAMA
from serving import VOCAB, Letters, endless_model, served

from megatron.inference import beam_search, text_batch
from megatron.inference.beam_search import BeamSearch
from megatron.inference.kv_cache import KVCache
from megatron.inference.restore import open_pipeline
from megatron.inference.sampling import Sampling
from megatron.inference.texts import Predictor
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Axis, Mesh
from megatron.serving.control import Control
from megatron.serving.engine import Engine
from megatron.serving.task import GenerationTask
from megatron.serving.waiting import MAX_OVERTAKEN, QueuedTask, TaskResult, TextUpdate, WaitingTasks

TOKENIZER = Letters()
GREEDY, SAMPLED = Sampling(0.0), Sampling(0.9, 30, 0.95)
LONG = tuple(range(2, 42))  # longer than a piece, which the tests make short


def task(*prompts: Sequence[int], count: int = 9, sampling: Sampling = GREEDY, seed: int = 0, **more) -> GenerationTask:
    return GenerationTask(tuple(map(tuple, prompts)), count, sampling, seed, **more)


TASKS = (
    task(LONG, count=4),
    task((5, 99, 17), (8,), LONG[:20], count=7),
    task((5, 99, 17), count=12, sampling=SAMPLED, seed=3),
    task((5, 99, 17), count=12, sampling=SAMPLED, seed=4),
    task((40, 41, 42, 43), LONG[:9], count=5, top=2),
    task(LONG[:30], count=6, beam=BeamSearch(3, 1.0, 7)),
    task((9, 9), count=30, sampling=SAMPLED, seed=5, stop_runs=((11,), (12,), (13,), (14,), (15,))),
    task((7,), count=1),
    task(LONG, count=3, sampling=SAMPLED, seed=6, top=0),
)


class Answers:
    """Clients that submit each task after so many updates of all tasks, and keep what they hear."""

    def __init__(self, tasks: Sequence[GenerationTask], begin: Sequence[int], drop: dict[int, int]) -> None:
        self.tasks, self.begin, self.drop = tasks, begin, drop
        self.tokens = [[list(prompt) for prompt in task.prompts] for task in tasks]
        self.scores = [[[] for _ in task.prompts] for task in tasks]
        self.results: dict[int, TaskResult] = {}
        self.engine: Engine | None = None
        self.updates = self.submitted = 0
        self.queued: dict[int, QueuedTask] = {}

    def submit_due(self) -> None:
        """Submit what is due; if nothing runs, the next one."""
        while self.submitted < len(self.tasks):
            idle = len(self.results) == self.submitted
            if self.begin[self.submitted] > self.updates and not idle:
                return
            number, self.submitted = self.submitted, self.submitted + 1
            self.queued[number] = QueuedTask(self.tasks[number], lambda event, number=number: self.hear(number, event))
            self.engine.submit(self.queued[number])

    def hear(self, number: int, event: TextUpdate | TaskResult) -> None:
        if isinstance(event, TaskResult):
            self.results[number] = event
        else:
            self.updates += 1
            self.tokens[number][event.index] += event.tokens
            self.scores[number][event.index] += event.scores
            if self.updates >= self.drop.get(number, 1 << 30):
                self.queued[number].dropped.set()
        self.submit_due()

    @property
    def all_here(self) -> bool:
        return len(self.results) == len(self.tasks)


def answer(
    model: Predictor,
    control: Control,
    tasks: Sequence[GenerationTask],
    begin: Sequence[int],
    drop: dict[int, int] | None = None,
    cache_tokens: int = 24000,
) -> Answers:
    """Let an engine answer tasks; on all ranks, of which the first hears them."""
    answers = Answers(tasks, begin, drop or {})
    answers.engine = Engine(model, TOKENIZER, control, cache_tokens=cache_tokens)
    if control.is_leader:
        answers.submit_due()
    answers.engine.run(lambda: control.is_leader and answers.all_here)
    return answers


def compare(alone: Sequence[Answers], together: Answers, wrong: Callable[[str], object]) -> None:
    """Compare every task's answer beside others with its answer alone; `wrong` hears of each difference."""
    for number, one in enumerate(alone):
        if together.tokens[number] != one.tokens[0]:
            wrong(f"tokens of task {number}: {together.tokens[number]} and alone {one.tokens[0]}")
        for mine, theirs in zip(together.scores[number], one.scores[0], strict=True):
            if [s.log_prob for s in mine] != pytest.approx([s.log_prob for s in theirs], abs=1e-4):
                wrong(f"scores of task {number}")
            if [[t for t, _ in s.top] for s in mine] != [[t for t, _ in s.top] for s in theirs]:
                wrong(f"alternatives of task {number}")
        if [b.tokens for b in together.results[number].beams] != [b.tokens for b in one.results[0].beams]:
            wrong(f"beams of task {number}")
        if together.results[number].error:
            wrong(f"error of task {number}: {together.results[number].error}")


def run_both(model: Predictor, control: Control, wrong: Callable[[str], object]) -> None:
    """Answer all tasks one by one, all at once, and one after every other token; compare on the first rank."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (text_batch, beam_search):
            patch.setattr(module, "PIECE", 8)
        patch.setattr(text_batch, "MAX_READ", 16)
        alone = [answer(model, control, [one], [0]) for one in TASKS]
        for begin in ([0] * len(TASKS), range(0, 2 * len(TASKS), 2), [0, 3, 3, 5, 5, 9, 9, 9, 14]):
            together = answer(model, control, TASKS, list(begin))
            if control.is_leader:
                compare(alone, together, wrong)


def fail(what: str) -> None:
    raise AssertionError(what)


def run_both_on_a_rank(root: str, tp: int) -> int:
    import torch.distributed as dist

    mesh = Mesh.build(Grid(tp=tp, pp=dist.get_world_size() // tp), dist.get_rank())
    run_both(open_pipeline(root, mesh).model, Control(mesh.world, timedelta(seconds=60)), fail)
    return len(TASKS)


@pytest.mark.parametrize("form", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_every_text_is_what_it_is_alone(form):
    run_both(as_pipeline(build_random_gpt(form, VOCAB)), Control(Axis.alone("world")), fail)


@pytest.mark.parametrize(("form", "tp"), [(LLAMA, 2), (GPT2, 1)], ids=["tp 2", "pp 2"])
def test_every_text_is_what_it_is_alone_on_ranks(form, tp, tmp_path):
    save_model(build_random_gpt(form, VOCAB), tmp_path)
    assert on_ranks(2, run_both_on_a_rank, str(tmp_path), tp) == [len(TASKS)] * 2


def shared_generator(seed: int, number: int, made: dict[str, torch.Generator] = {}) -> torch.Generator:  # noqa: B006
    return made.setdefault("only", torch.Generator().manual_seed(1))


def neighbour_extend(self: KVCache, layer, piece, key, value, extend=KVCache.extend, last: list[KVCache] = []):  # noqa: B006
    """Attention to the cache of whoever was computed before, where it is as long."""
    keys, values = extend(self, layer, piece, key, value)
    if last and last[-1] is not self and layer in last[-1]._held:
        other = [held[:1, :, : keys.shape[2]] for held in last[-1]._held[layer]]
        if other[0].shape[2] == keys.shape[2]:
            keys, values = (held.expand(keys.shape) for held in other)
    last.append(self)
    return keys, values


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("megatron.inference.text_batch._generator", shared_generator),
        ("megatron.inference.kv_cache.KVCache.extend", neighbour_extend),
    ],
    ids=["one generator for all", "a neighbour's keys"],
)
def test_the_comparison_sees_texts_that_depend_on_their_neighbours(name, fault, monkeypatch):
    monkeypatch.setattr(name, fault)
    seen: list[str] = []
    run_both(as_pipeline(build_random_gpt(LLAMA, VOCAB)), Control(Axis.alone("world")), seen.append)
    assert seen


def test_a_dropped_task_gives_its_room_to_the_next():
    model, control = as_pipeline(endless_model()), Control(Axis.alone("world"))
    tasks = [task((1,), count=900), task((2,), count=900), task((3,), count=2)]
    together = answer(model, control, tasks, [0, 0, 0], {0: 5, 1: 40}, cache_tokens=1000)
    assert [together.results[i].status for i in (0, 1)] == [499, 499] and len(together.tokens[0][0]) < 20
    assert len(together.tokens[2][0]) == 3 and len(together.tokens[1][0]) > 1
    assert list(together.results) == [2, 0, 1]  # what fits beside the first goes past the second


def test_small_tasks_overtake_a_large_one_only_so_often():
    waiting = WaitingTasks(1000)
    large = QueuedTask(task((1,), count=99), print)
    waiting.put(large)
    for _ in range(MAX_OVERTAKEN + 5):
        waiting.put(QueuedTask(task((1,), count=9), print))
    assert len(waiting.take(50, 9)) == 5
    for _ in range(100):
        waiting.take(10, 9)
    assert large.overtaken == MAX_OVERTAKEN and waiting.take(100, 9) == [large]


def test_a_short_request_does_not_wait_for_long_ones():
    """Beside a stream without end and a prompt that takes many passes, one token is there within a second."""
    endless = {"prompt": "x", "max_tokens": 11000, "temperature": 0, "stream": True}
    with served(endless_model(), TOKENIZER, cache_tokens=40000) as client, client.connected(endless) as streaming:
        assert b"200" in streaming.recv(100)
        reading = threading.Thread(target=lambda: client.complete(prompt="x" * 9000, max_tokens=1))
        reading.start()
        time.sleep(0.1)
        took = []
        for _ in range(5):
            began = time.monotonic()
            client.complete(prompt="Hello", max_tokens=1)
            took.append(time.monotonic() - began)
        assert min(took) < 1.0, took
        reading.join(60)
        assert not reading.is_alive()
