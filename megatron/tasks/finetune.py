"""Fine-tune a model on a task: train on its examples with a task head, and score its evaluation files after each epoch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.checkpoint.tokenizer import open_tokenizer
from megatron.config.command_line.parse import Parsed
from megatron.config.errors import ConfigError
from megatron.config.optim import warm_up, wsd_phases
from megatron.config.resolve import resolve
from megatron.config.rules import resolved_check
from megatron.config.schema import RunConfig
from megatron.data.bert_batch import BertCollator
from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.files.pending import write_whole
from megatron.inference.pipeline import Pipeline
from megatron.launch.watchdog import Watchdog
from megatron.plan.stages import plan_stages
from megatron.tasks.glue import MNLI, QQP, PairClassification
from megatron.tasks.race import Race
from megatron.tasks.samples import Example, ExampleCollator, PaddedExamples, ShuffledEpochs, Task, TaskScore
from megatron.tasks.squad import Squad
from megatron.tasks.tagging import Tagging, collect_labels
from megatron.train.errors import TrainingError
from megatron.train.job_runner import as_input_error, print_lines
from megatron.train.loop import Training
from megatron.train.pretraining import Prepared
from megatron.train.resume import check_source, find_source
from megatron.train.resumed_schedule import check_schedule
from megatron.train.run import Run
from megatron.train.save_directory import check_save
from megatron.train.source import StateSource


def build_task(config: RunConfig, tokenizer: Tokenizer) -> Task:
    """Build the task that a resolved configuration names, with the labels of its model. DataError without [CLS]."""
    seq_length, labels = config.data.seq_length, config.model.labels
    makers: dict[str, Callable[[], Task]] = {
        "MNLI": partial(PairClassification, tokenizer, seq_length, MNLI, labels),
        "QQP": partial(PairClassification, tokenizer, seq_length, QQP, labels),
        "RACE": partial(Race, tokenizer, seq_length, labels),
        "SQUAD": partial(Squad, tokenizer, seq_length),
        "NER": partial(Tagging, tokenizer, seq_length, labels),
    }
    return makers[config.task.task or ""]()


def prepare_finetuning(parsed: Parsed, watch: Watchdog) -> Prepared:
    """Open the tokenizer, the checkpoint to start from and the examples. InputError if one of them cannot be used."""
    with as_input_error():
        config, notes = parsed.config, list(parsed.notes)
        watch.waiting("looking for a checkpoint")
        source = find_source(config.checkpoint)
        tokenizer = _tokenizer(config, source)
        model = replace(config.model, vocab_size=tokenizer.vocab_size, labels=_labels(config, source))
        config = replace(config, model=model)
        check_source(source, config)
        notes += check_save(source, config)
        watch.waiting("reading the samples")
        task = build_task(config, tokenizer)
        files = [EvaluationFile(path, task.read(path, training=False)) for path in config.task.valid_data]
        size, training = config.batch.global_batch_size, None
        held_out = PaddedExamples([example for file in files for example in file.examples], task, size)
        # Each evaluation reads all examples, unless the user sets --eval-iters.
        draw = len(held_out) // size
        draw = min(draw, config.eval.eval_iters) if "eval.eval_iters" in parsed.set_by_user else draw
        config = replace(config, eval=replace(config.eval, eval_iters=draw))
        if not config.eval.skip_train:
            examples = [example for path in config.task.train_data for example in task.read(path, training=True)]
            training = ShuffledEpochs(examples, config.task.epochs or 0, size, config.batch.seed)
            config = _with_length(config, training, parsed)
            check_schedule(source, config)
            notes.append(f"{len(examples)} samples to train on, {config.batch.train_iters} iterations of {size}")
        segments = config.model.num_token_types > 0
        batches = ExampleCollator(BertCollator(config.data.seq_length, tokenizer.token("pad"), segments), task.rows)
        notes += task.notes
    scorer = partial(TaskEvaluator, task, batches, files)
    validation = held_out if config.eval.eval_iters else None
    return Prepared(
        config,
        tuple(notes),
        tokenizer,
        source,
        (training, validation, None),
        batches,
        scorer=scorer if files else None,
        score_interval=None if training is None else training.epoch_size // size,
        final=partial(score_final_model, scorer),
    )


def _tokenizer(config: RunConfig, source: StateSource) -> Tokenizer:
    """Return the tokenizer of the command, else the checkpoint's."""
    if config.tokenizer.tokenizer_type is not None:
        return build_tokenizer(config.tokenizer)
    tokenizer = open_tokenizer(source.directory) if source.directory is not None else None
    if tokenizer is None:
        raise DataError(f"{source.directory} holds no tokenizer: name the one it was trained with, with --tokenizer-type")
    return tokenizer


def _labels(config: RunConfig, source: StateSource) -> tuple[str, ...]:
    """Return the labels: those of the task; for tags, those of a fine-tuned checkpoint, else those of the training data."""
    if config.model.task_head != "tags":
        return config.model.labels
    saved = source.saved.model if source.saved is not None else config.model
    return saved.labels if saved.task_head == "tags" else collect_labels(config.task.train_data or config.task.valid_data)


def _with_length(config: RunConfig, training: ShuffledEpochs, parsed: Parsed) -> RunConfig:
    """Return the configuration with the iterations of all epochs; it validates after each epoch by default."""
    iterations_per_epoch = training.epoch_size // config.batch.global_batch_size
    interval = config.eval.eval_interval if "eval.eval_interval" in parsed.set_by_user else iterations_per_epoch
    config = replace(
        config,
        batch=replace(config.batch, train_iters=training.epochs * iterations_per_epoch),
        eval=replace(config.eval, eval_interval=interval),
    )
    config = resolve(config, parsed.world_size)
    case = resolved_check(config, parsed.world_size)
    if problems := [*warm_up(case), *wsd_phases(case)]:
        raise ConfigError(problems)
    return config


@dataclass(frozen=True)
class EvaluationFile:
    """The examples of one file of --valid-data."""

    path: str
    examples: Sequence[Example]


class TaskEvaluator:
    """Answers every example of the evaluation files with the run's model, on its layout, and scores the answers."""

    def __init__(self, task: Task, batches: ExampleCollator, files: Sequence[EvaluationFile], run: Run) -> None:
        self.task, self.batches, self.files, self.run = task, batches, files, run
        placement = plan_stages(run.config).placement
        self.model = Pipeline(run.config.model, run.stages, placement, run.pipeline.channels)

    def __call__(self, training: Training) -> dict[str, Any] | None:
        """Return scores and answers of each file as JSON values. Collective. None if the run is asked to stop."""
        results, every = [], []
        for file in self.files:
            answers = self._answers(file.examples, training)
            if answers is None:
                return None
            score = self.task.score(file.examples, answers)
            training.log(self._line(Path(file.path).name, score))
            named = self.task.list_answers(file.examples, answers)
            results.append({"path": file.path, **score.metrics, **score.counts, "answers": named})
            every += answers
        if len(results) > 1:
            # Files can have examples of the same name, as SQuAD 1.1 and 2.0 do.
            examples = [
                replace(example, name=f"{n}:{example.name}") for n, file in enumerate(self.files) for example in file.examples
            ]
            score = self.task.score(examples, every)
            training.log(self._line("overall", score))
        return {"files": results, **score.metrics, **score.counts}

    @torch.no_grad()
    def _answers(self, examples: Sequence[Example], training: Training) -> list[Any] | None:
        """Return the answer to each example, on every rank; data-parallel ranks share the work. None if the run is to stop."""
        dp, size = self.run.mesh.dp, self.run.config.batch.micro_batch_size
        source, block = PaddedExamples(examples, self.task, size * dp.size), size * dp.size
        mine: list[Any] = []
        self.model.eval()
        try:
            for first in range(0, len(source), block):
                if training.should_stop():
                    return None
                self.run.job.watch.doing("evaluating the task")
                numbers = range(first + dp.rank * size, first + (dp.rank + 1) * size)
                # [rows, classes], [rows, seq, tags], or [2, rows, seq] of a span
                logits = self.model.task_logits(self.batches(source, numbers, numbers).to(self.run.job.device)).cpu()
                mine += [self._answer(examples, n, row) for n, row in zip(numbers, self._split_examples(logits), strict=True)]
        finally:
            for stage in self.run.stages.values():
                stage.train(True)
        parts = [mine]  # the answers of each data-parallel rank
        if dp.group is not None:
            parts = [[] for _ in range(dp.size)]
            dist.all_gather_object(parts, mine, group=dp.group)
        # Restore the order of the examples: in each block, one part of every data-parallel rank follows the other.
        blocks = [part[first : first + size] for first in range(0, len(mine), size) for part in parts]
        answers = [answer for block in blocks for answer in block][: len(examples)]
        if None in answers:
            what = f"the answer to {examples[answers.index(None)].name} is not a number"
            raise TrainingError(
                f"{what}: the model's weights are damaged, or its training diverged; go on from another checkpoint"
            )
        return answers

    def _split_examples(self, logits: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split the logits of a batch into those of each example. For spans the batch is dimension 1: `[2, rows, seq]`."""
        return logits.unbind(1) if self.run.config.model.task_head == "span" else logits.unbind(0)

    def _answer(self, examples: Sequence[Example], number: int, logits: torch.Tensor) -> Any:
        """Return the answer to one example; None for padding of the last batch, and for logits that are NaN."""
        return None if number >= len(examples) or logits.isnan().any() else self.task.decode(examples[number], logits)

    def _line(self, name: str, score: TaskScore) -> str:
        """Return the line about a score, in Megatron-LM's words."""
        config, done = self.run.config, self.run.state.iteration
        per_epoch = max(1, config.batch.iterations // (config.task.epochs or 1))
        text = f" >> |epoch: {done // per_epoch if config.batch.train_iters else 0}| {name}: "
        text += f"correct / total = {score.counts['correct']} / {score.counts['total']}"
        return text + "".join(f", {metric} = {value:.4f} %" for metric, value in score.metrics.items())


def score_final_model(scorer: Callable[[Run], TaskEvaluator], training: Training) -> None:
    """Score the finished model, and write the results to a file. Collective. After a stop, the next start does it."""
    run = training.run
    results = scorer(run)(training) if run.config.task.valid_data else None
    path = run.config.task.results_path
    if results is not None and path is not None and run.job.is_main:
        write_results(path, {"task": run.config.task.task, "iteration": run.state.iteration, **results})
        print_lines(sys.stdout, f"results: {path}")


def write_results(path: str, results: dict[str, Any]) -> None:
    """Write results to a JSON file, atomically. When the disk refuses, print them and raise TrainingError."""
    text = json.dumps(results, indent=1) + "\n"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        print_lines(sys.stdout, text)
        raise TrainingError(f"--results-path {path}: cannot be written, the results are printed instead: {error}") from error
