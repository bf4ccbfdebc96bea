"""One transformer layer: two residual lines."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.mesh.mesh import Axis
from megatron.model.attention import Attend, Attention, Cache, Masks
from megatron.model.mlp import MLP
from megatron.model.norm import Norm
from megatron.model.rotary import Rotary
from megatron.parallel.random import DropoutKeys, drop


def hidden_dropout(x: Tensor, keys: DropoutKeys | None, layer: int, site: str, probability: float) -> Tensor:
    """Dropout of the residual stream; `keys` is None outside training."""
    if keys is None or probability == 0.0:
        return x
    return drop(x, keys.features(layer, site, x.shape[-1]), probability)


class Block(nn.Module):
    """`[seq, batch, hidden] -> [seq, batch, hidden]`, pre-norm; `layer` is the global number, from 0.

    apply_residual_connection_post_layernorm takes the residual from the norm's output, as the original BERT does.
    """

    def __init__(self, config: ModelConfig, layer: int, tp: Axis, attend: Attend, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.layer, self.probability = layer, config.hidden_dropout
        self.residual_from_norm = config.apply_residual_connection_post_layernorm
        self.input_norm = Norm(config, sequence_parallel=sequence_parallel)
        self.attention = Attention(config, layer, tp, attend, sequence_parallel=sequence_parallel)
        self.mlp_norm = Norm(config, sequence_parallel=sequence_parallel)
        self.mlp = MLP(config, tp, sequence_parallel=sequence_parallel)

    def forward(
        self, x: Tensor, masks: Masks, keys: DropoutKeys | None, rotary: Rotary | None = None, cache: Cache | None = None
    ) -> Tensor:
        normed = self.input_norm(x)
        attended = self.attention(normed, masks, rotary, cache)
        x = (normed if self.residual_from_norm else x) + self._drop(attended, keys, "attention")
        normed = self.mlp_norm(x)
        return (normed if self.residual_from_norm else x) + self._drop(self.mlp(normed), keys, "mlp")

    def _drop(self, x: Tensor, keys: DropoutKeys | None, site: str) -> Tensor:
        return hidden_dropout(x, keys, self.layer, site, self.probability)
