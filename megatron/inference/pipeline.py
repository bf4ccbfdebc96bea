"""The whole model's predictions where its stages lie on several ranks: one pass up the pipeline, the answer to all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.contract import Batch, Prediction, StagePart
from megatron.model.gpt import empty_prediction
from megatron.pipeline.schedules.lower import channels_of
from megatron.pipeline.transfer import Channels


class Stage(Protocol):
    """What a stage's module does for a prediction; `model.gpt.GPT` is one."""

    part: StagePart
    dtype: torch.dtype

    def hidden(self, x: Tensor | None, batch: Batch, cache: Any = None) -> Tensor: ...
    def hidden_shape(self, batch: Batch) -> tuple[int, ...]: ...
    def scores(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]: ...
    def answer(self, x: Tensor, batch: Batch, top: int | None = None) -> Prediction: ...
    def train(self, mode: bool = True) -> object: ...


class TaskStage(Stage, Protocol):
    """A stage of a model with a task's head; `model.task_heads.FineTuned` is one."""

    def task_logits(self, x: Tensor, batch: Batch) -> Tensor: ...
    def task_shape(self, batch: Batch) -> tuple[int, ...]: ...


class Pipeline:
    """A model cut over ranks, used like a whole one.

    config: of the model. stages: this rank's, by number. placement: stage -> pipeline rank.
    """

    def __init__(
        self, config: ModelConfig, stages: Mapping[int, Stage], placement: tuple[int, ...], channels: Channels
    ) -> None:
        self.config, self.stages, self.placement, self.channels = config, stages, placement, channels
        self.device = channels.device
        channels.connect(list(channels_of(placement)))

    def eval(self) -> None:
        """Dropout off."""
        for stage in self.stages.values():
            stage.train(False)

    @torch.no_grad()
    def predict(self, batch: Batch, cache: Any = None, top: int | None = None) -> Prediction:
        """The prediction on every rank, padding left out. Collective. Only what was asked for travels: one row of logits for
        each sequence, and with `top` the log-probabilities of the tokens inside."""
        x = self._final_hidden(batch, cache)
        rows, seq = batch.tokens.shape
        if x is not None:
            found = self.stages[len(self.placement) - 1].answer(x, batch, top)
        else:
            found = empty_prediction(seq, rows, self.config.size("vocab_size"), top, self.device)
        for part in (found.logits, found.log_probs, found.ids):
            if part.numel():
                self._to_all(part)
        return found

    @torch.no_grad()
    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The labels' log-probabilities, fp32 `[seq, batch]`, and bool whether each is the most probable token; on every rank.

        Collective. Logits stay where they are made: two numbers a token travel.
        """
        x = self._final_hidden(batch, None)
        rows, seq = batch.tokens.shape
        answer = torch.empty(2, seq, rows, device=self.device)
        if x is not None:
            for part, made in zip(answer, self.stages[len(self.placement) - 1].scores(x, batch), strict=True):
                part.copy_(made)
        answer = self._to_all(answer)
        return answer[0], answer[1] > 0.5

    @torch.no_grad()
    def task_logits(self, batch: Batch) -> Tensor:
        """Of a model with a task's head, fp32, on every rank. Collective."""
        x, stages = self._final_hidden(batch, None), cast(Mapping[int, TaskStage], self.stages)
        answer = torch.empty(next(iter(stages.values())).task_shape(batch), device=self.device)
        if x is not None:
            answer.copy_(stages[len(self.placement) - 1].task_logits(x, batch))
        return self._to_all(answer)

    def _final_hidden(self, batch: Batch, cache: Any) -> Tensor | None:
        """One pass up the pipeline: what its last stage makes of it, where that stage is; elsewhere None."""
        x: Tensor | None = None
        me, last = self.channels.up.rank, len(self.placement) - 1
        for number, owner in enumerate(self.placement):
            before = self.placement[number - 1] if number else owner
            if owner == me:
                stage = self.stages[number]
                if before != me:
                    x = self.channels.receive(stage.hidden_shape(batch), stage.dtype, before, number).wait()
                x = stage.hidden(x, batch, cache)
            if number < last and owner == me != self.placement[number + 1] and x is not None:
                self.channels.send(x, self.placement[number + 1], number + 1)
        return x if last in self.stages else None

    def _to_all(self, answer: Tensor) -> Tensor:
        """The last stage's answer on every rank of the pipeline, in place, once all that was sent has left."""
        self.channels.settle_all()
        return self.channels.broadcast(answer, self.placement[-1])
