"""The whole model's predictions where its stages lie on several ranks: one pass up the pipeline, the answer to all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.contract import Batch, Prediction, StagePart
from megatron.pipeline.lower import channels_of
from megatron.pipeline.transfer import Channels


class Stage(Protocol):
    """What a stage's module does for a prediction; `model.gpt.GPT` is one."""

    part: StagePart
    dtype: torch.dtype

    def hidden(self, x: Tensor | None, batch: Batch, cache: Any = None) -> Tensor: ...
    def hidden_shape(self, batch: Batch) -> tuple[int, ...]: ...
    def output(self, x: Tensor) -> Tensor: ...
    def answer(self, x: Tensor, batch: Batch, top: int | None = None) -> Prediction: ...
    def train(self, mode: bool = True) -> object: ...


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
    def logits(self, batch: Batch, cache: Any = None) -> Tensor:
        """fp32 `[seq, batch, vocab]` on every rank, padding left out. Collective. cache: of this rank, for all its stages."""
        x, last = self._climb(batch, cache), len(self.placement) - 1
        rows, seq = batch.tokens.shape
        answer = torch.empty(seq, rows, self.config.size("vocab_size"), device=self.device)
        if x is not None:
            answer.copy_(self.stages[last].output(x))
        self.channels.settle_all()
        return self.channels.broadcast(answer, self.placement[last])

    @torch.no_grad()
    def predict(self, batch: Batch, cache: Any = None, top: int | None = None) -> Prediction:
        """The prediction on every rank, padding left out. Collective. Only what was asked for travels: one row of logits for
        each sequence, and with `top` the log-probabilities of the tokens inside."""
        x, last = self._climb(batch, cache), len(self.placement) - 1
        rows, seq = batch.tokens.shape
        if x is not None:
            found = self.stages[last].answer(x, batch, top)
        else:
            found = Prediction.empty(seq, rows, self.config.size("vocab_size"), top, self.device)
        self.channels.settle_all()
        for part in (found.logits, found.log_probs, found.ids):
            if part.numel():
                self.channels.broadcast(part, self.placement[last])
        return found

    def _climb(self, batch: Batch, cache: Any) -> Tensor | None:
        """Through all stages: the final hidden states where the last stage is, None on other ranks."""
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
