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
    """Build the task of a resolved configuration, with its model's labels. DataError if the tokenizer has no [CLS]."""
    seq_length, labels = config.data.seq_length, config.model.labels
    builders: dict[str, Callable[[], Task]] = {
        "MNLI": partial(PairClassification, tokenizer, seq_length, MNLI, labels),
        "QQP": partial(PairClassification, tokenizer, seq_length, QQP, labels),
        "RACE": partial(Race, tokenizer, seq_length, labels),
        "SQUAD": partial(Squad, tokenizer, seq_length),
        "NER": partial(Tagging, tokenizer, seq_length, labels),
    }
    return builders[config.task.task or ""]()


def prepare_finetuning(parsed: Parsed, watch: Watchdog) -> Prepared:
    """Open tokenizer, checkpoint and examples, and complete the configuration. InputError if a file cannot be used."""
    with as_input_error():
        config, notes = parsed.config, list(parsed.notes)
        watch.waiting("looking for a checkpoint")
        source = find_source(config.checkpoint)
        tokenizer = _open_tokenizer(config, source)
        model = replace(config.model, vocab_size=tokenizer.vocab_size, labels=_choose_labels(config, source))
        config = replace(config, model=model)
        check_source(source, config)
        notes += check_save(source, config)
        watch.waiting("reading the samples")
        task = build_task(config, tokenizer)
        files = [EvaluationFile(path, task.read(path, training=False)) for path in config.task.valid_data]
        batch_size, training = config.batch.global_batch_size, None
        held_out = PaddedExamples([example for file in files for example in file.examples], task, batch_size)
        # Each validation reads all examples, unless the user sets --eval-iters.
        eval_iters = len(held_out) // batch_size
        eval_iters = min(eval_iters, config.eval.eval_iters) if "eval.eval_iters" in parsed.set_by_user else eval_iters
        config = replace(config, eval=replace(config.eval, eval_iters=eval_iters))
        if not config.eval.skip_train:
            examples = [example for path in config.task.train_data for example in task.read(path, training=True)]
            training = ShuffledEpochs(examples, config.task.epochs or 0, batch_size, config.batch.seed)
            config = _set_train_iters(config, training, parsed)
            check_schedule(source, config)
            notes.append(f"{len(examples)} samples to train on, {config.batch.train_iters} iterations of {batch_size}")
        has_segments = config.model.num_token_types > 0
        collator = ExampleCollator(BertCollator(config.data.seq_length, tokenizer.token("pad"), has_segments), task.rows)
        notes += task.notes
    build_evaluator = partial(TaskEvaluator, task, collator, files)
    validation = held_out if config.eval.eval_iters else None
    return Prepared(
        config,
        tuple(notes),
        tokenizer,
        source,
        (training, validation, None),
        collator,
        scorer=build_evaluator if files else None,
        score_interval=None if training is None else training.epoch_size // batch_size,
        final=partial(score_final_model, build_evaluator),
    )


def _open_tokenizer(config: RunConfig, source: StateSource) -> Tokenizer:
    """Return the tokenizer that the command names, else the checkpoint's; DataError if there is neither."""
    if config.tokenizer.tokenizer_type is not None:
        return build_tokenizer(config.tokenizer)
    tokenizer = open_tokenizer(source.directory) if source.directory is not None else None
    if tokenizer is None:
        raise DataError(f"{source.directory} has no tokenizer: give the one of its training by --tokenizer-type")
    return tokenizer


def _choose_labels(config: RunConfig, source: StateSource) -> tuple[str, ...]:
    """Return the task's labels; for tagging, those of a fine-tuned checkpoint, else all tags of the data files."""
    if config.model.task_head != "tags":
        return config.model.labels
    saved = source.saved.model if source.saved is not None else config.model
    return saved.labels if saved.task_head == "tags" else collect_labels(config.task.train_data or config.task.valid_data)


def _set_train_iters(config: RunConfig, training: ShuffledEpochs, parsed: Parsed) -> RunConfig:
    """Return the configuration with the iterations of all epochs and, unless set, a validation after each epoch."""
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
    """One file of --valid-data, and its examples."""

    path: str
    examples: Sequence[Example]


class TaskEvaluator:
    """Computes the answers of the run's model to all examples of the evaluation files, on any layout, and scores them."""

    def __init__(self, task: Task, collator: ExampleCollator, files: Sequence[EvaluationFile], run: Run) -> None:
        self.task, self.collator, self.files, self.run = task, collator, files, run
        placement = plan_stages(run.config).placement
        self.model = Pipeline(run.config.model, run.stages, placement, run.pipeline.channels)

    def __call__(self, training: Training) -> dict[str, Any] | None:
        """Return scores and answers of each file as JSON values; None if the run is asked to stop. Collective."""
        results, all_answers = [], []
        for file in self.files:
            answers = self._compute_answers(file.examples, training)
            if answers is None:
                return None
            score = self.task.score(file.examples, answers)
            training.log(self._format_line(Path(file.path).name, score))
            named_answers = self.task.list_answers(file.examples, answers)
            results.append({"path": file.path, **score.metrics, **score.counts, "answers": named_answers})
            all_answers += answers
        if len(results) > 1:
            # Names are made unique, since files can contain the same names, as SQuAD 1.1 and 2.0 do.
            examples = [
                replace(example, name=f"{n}:{example.name}") for n, file in enumerate(self.files) for example in file.examples
            ]
            score = self.task.score(examples, all_answers)
            training.log(self._format_line("overall", score))
        return {"files": results, **score.metrics, **score.counts}

    @torch.no_grad()
    def _compute_answers(self, examples: Sequence[Example], training: Training) -> list[Any] | None:
        """Return the answers to all examples on every rank; None if the run is asked to stop. Collective."""
        dp, size = self.run.mesh.dp, self.run.config.batch.micro_batch_size
        block_size = size * dp.size  # a micro-batch for each data-parallel rank
        padded = PaddedExamples(examples, self.task, block_size)
        own_answers: list[Any] = []
        self.model.eval()
        try:
            for first in range(0, len(padded), block_size):
                if training.should_stop():
                    return None
                self.run.job.watch.doing("evaluating the task")
                numbers = range(first + dp.rank * size, first + (dp.rank + 1) * size)
                batch = self.collator(padded, numbers, numbers).to(self.run.job.device)
                # [batch, classes], [batch, seq, tags], or for spans [2, batch, seq]
                logits = self.model.task_logits(batch).cpu()
                for number, example_logits in zip(numbers, self._split_examples(logits), strict=True):
                    own_answers.append(self._decode(examples, number, example_logits))
        finally:
            for stage in self.run.stages.values():
                stage.train(True)
        answers_by_rank = [own_answers]
        if dp.group is not None:
            answers_by_rank = [[] for _ in range(dp.size)]
            dist.all_gather_object(answers_by_rank, own_answers, group=dp.group)
        # Restore the order of the examples, whose blocks consist of one micro-batch of each data-parallel rank.
        starts = range(0, len(own_answers), size)
        answers = [answer for start in starts for part in answers_by_rank for answer in part[start : start + size]]
        del answers[len(examples) :]  # the padding
        if None in answers:
            what = f"the model's output for {examples[answers.index(None)].name} is NaN"
            raise TrainingError(f"{what}: its weights are damaged, or its training diverged; start from another checkpoint")
        return answers

    def _split_examples(self, logits: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split the logits of a batch by example. For spans the batch is dimension 1: `[2, batch, seq]`."""
        return logits.unbind(1) if self.run.config.model.task_head == "span" else logits.unbind(0)

    def _decode(self, examples: Sequence[Example], number: int, logits: torch.Tensor) -> Any:
        """Return the answer to one example; None for padding, or if a logit is NaN."""
        return None if number >= len(examples) or logits.isnan().any() else self.task.decode(examples[number], logits)

    def _format_line(self, name: str, score: TaskScore) -> str:
        """Return the line about the score of a file, in Megatron-LM's format."""
        config, iteration = self.run.config, self.run.state.iteration
        epoch_iterations = max(1, config.batch.iterations // (config.task.epochs or 1))
        text = f" >> |epoch: {iteration // epoch_iterations if config.batch.train_iters else 0}| {name}: "
        text += f"correct / total = {score.counts['correct']} / {score.counts['total']}"
        return text + "".join(f", {metric} = {value:.4f} %" for metric, value in score.metrics.items())


def score_final_model(build_evaluator: Callable[[Run], TaskEvaluator], training: Training) -> None:
    """Score the model at the end of training, and write the results to --results-path. Collective."""
    run = training.run
    results = build_evaluator(run)(training) if run.config.task.valid_data else None
    path = run.config.task.results_path
    if results is not None and path is not None and run.job.is_main:
        write_results(path, {"task": run.config.task.task, "iteration": run.state.iteration, **results})
        print_lines(sys.stdout, f"results: {path}")


def write_results(path: str, results: dict[str, Any]) -> None:
    """Write results to a JSON file atomically; if that fails, print them and raise TrainingError."""
    text = json.dumps(results, indent=1) + "\n"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        print_lines(sys.stdout, text)
        raise TrainingError(f"--results-path {path}: cannot be written, the results are printed instead: {error}") from error
