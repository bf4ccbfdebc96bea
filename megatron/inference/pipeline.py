"""Predictions of a model whose stages lie on several ranks: one forward pass, whose result is broadcast to all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.contract import Batch
from megatron.inference.kv_cache import NewTokens, Pass
from megatron.inference.prediction import Prediction, empty_prediction, predict
from megatron.launch.memory import host_memory
from megatron.mesh.mesh import Axis
from megatron.model.gpt import GPT
from megatron.model.task_heads import FineTuned
from megatron.model.transformer import Transformer
from megatron.parallel.linear import ColumnLinear, RowLinear
from megatron.parallel.output import VocabOutput
from megatron.parallel.packed import order_by_columns, pack_weight
from megatron.pipeline.schedules.lower import channel_pairs
from megatron.pipeline.transfer import Channels


class Pipeline:
    """A model divided over pipeline ranks, with the interface of a whole one.

    Args:
        config: the model's configuration.
        stages: this rank's stages, by their number.
        placement: the pipeline rank of each stage.
        channels: transfer hidden states between ranks.
    """

    def __init__(
        self, config: ModelConfig, stages: Mapping[int, Transformer], placement: tuple[int, ...], channels: Channels
    ) -> None:
        self.config, self.stages, self.placement, self.channels = config, stages, placement, channels
        self.device = channels.device
        channels.connect(list(channel_pairs(placement)))

    @classmethod
    def alone(cls, model: Transformer) -> Pipeline:
        """Return a whole model of this process as a pipeline of one stage."""
        return cls(model.config, {0: model}, (0,), Channels(Axis.alone("pp"), Axis.alone("pp"), model.device))

    def eval(self) -> None:
        """Put all stages into evaluation mode, without dropout."""
        for stage in self.stages.values():
            stage.train(False)

    def pack_weights(self) -> None:
        """Arrange the weights of this rank's stages for generation on a CPU; on other devices do nothing.

        They get a packed copy, unless the copies would take more than half of the free memory. Copies do not follow later
        changes of the weights.
        """
        layers = [layer for stage in self.stages.values() for layer in stage.modules()]
        linear = [layer.weight for layer in layers if isinstance(layer, ColumnLinear | RowLinear)]
        weights = linear + [layer.matrix for layer in layers if isinstance(layer, VocabOutput)]
        memory = host_memory()
        if memory is not None and 2 * sum(weight.nbytes for weight in weights) < memory.free:
            for weight in weights:
                pack_weight(weight)
        for weight in linear:
            order_by_columns(weight)

    @torch.no_grad()
    def predict(self, pieces: Sequence[NewTokens], top: int = 0) -> Prediction:
        """Compute the new tokens of any number of texts in one pass; return the prediction on every rank. Collective.

        Only what was asked for is sent, without the padding of the vocabulary: one row of logits for each text, and the
        log-probabilities.

        Args:
            pieces: the new tokens; their keys and values are written into the caches.
            top: number of most probable tokens at each position that is scored.
        """
        new = Pass(pieces, self.device)
        x, vocab = self._final_hidden(new.batch, new), self.config.known_vocab_size  # [tokens, 1, hidden] on the last stage
        if x is not None:
            found = predict(cast(GPT, self._last).logits, x, new, vocab, top)
        else:
            found = empty_prediction(new, vocab, top, self.device)
        self.channels.wait_all_sends()
        # A part without elements is the same on all ranks, so all leave out its broadcast.
        for part in (found.logits, found.log_probs, found.ids):
            if part.numel():
                self._broadcast(part)
        return found

    @torch.no_grad()
    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the labels' log-probabilities, fp32 `[seq, batch]`, and whether each is the most probable token, bool.

        Collective; every rank gets the result. Logits stay on the last stage: two numbers per token are sent.
        """
        x = self._final_hidden(batch, None)
        rows, seq = batch.tokens.shape
        answer = torch.empty(2, seq, rows, device=self.device)  # [2, seq, batch]: one broadcast for both
        if x is not None:
            for part, made in zip(answer, cast(GPT, self._last).output.label_scores(x, batch.labels), strict=True):
                part.copy_(made)
        answer = self._broadcast(answer)  # [2, seq, batch]
        return answer[0], answer[1] > 0.5  # each [seq, batch]; a hit is sent as 1.0

    @torch.no_grad()
    def task_logits(self, batch: Batch) -> Tensor:
        """Return the fp32 logits of a model with a task's head, on every rank. Collective."""
        x = self._final_hidden(batch, None)
        answer = torch.empty(cast(FineTuned, next(iter(self.stages.values()))).task_shape(batch), device=self.device)
        if x is not None:
            answer.copy_(cast(FineTuned, self._last).task_logits(x, batch))
        return self._broadcast(answer)

    @property
    def _last(self) -> Transformer:
        """The stage with the heads; KeyError on other ranks than the last."""
        return self.stages[len(self.placement) - 1]

    def _final_hidden(self, batch: Batch, cache: Pass | None) -> Tensor | None:
        """Run one forward pass; return the final hidden states `[seq, batch, hidden]` on the last stage's rank, else None."""
        x: Tensor | None = None
        me, last = self.channels.up.rank, len(self.placement) - 1
        for number, owner in enumerate(self.placement):
            before = self.placement[number - 1] if number else owner
            if owner == me:
                stage = self.stages[number]
                if before != me:  # between stages of the same rank, x is passed on in memory
                    x = self.channels.receive(stage.hidden_shape(batch), stage.dtype, before, number).wait()
                x = stage.hidden(x, batch, cache)
            if number < last and owner == me != self.placement[number + 1] and x is not None:
                self.channels.send(x, self.placement[number + 1], number + 1)
        return x if last in self.stages else None

    def _broadcast(self, answer: Tensor) -> Tensor:
        """Send the last stage's tensor to every rank of the pipeline, in place, after the pending sends."""
        self.channels.wait_all_sends()
        return self.channels.broadcast(answer, self.placement[-1])
