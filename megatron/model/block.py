"""One transformer layer: two residual lines."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.model.attention import Attend, Attention, AttentionCache, Masks
from megatron.model.mlp import MLP
from megatron.model.norm import make_norm
from megatron.model.rotary import Rotary
from megatron.parallel.cost import ActivationBytes, MicroBatchShape
from megatron.parallel.random import DropoutKeys, drop, site_key
from megatron.parallel.tensor_parallel import TensorParallel


class HiddenDropout(nn.Module):
    """Dropout of the residual stream at one place of the model."""

    def __init__(self, seed: int, layer: int, site: str, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.register_buffer("key", site_key(seed, layer, site), persistent=False)

    def activation_bytes(self, shape: MicroBatchShape) -> ActivationBytes:
        """Return the bytes of its mask, one for each element."""
        return ActivationBytes(saved=shape.hidden_elements if self.probability > 0.0 else 0)

    def forward(self, x: Tensor, keys: DropoutKeys | None) -> Tensor:
        """keys: the random identity of x's tokens; None outside training."""
        if keys is None or self.probability == 0.0:
            return x
        return drop(x, keys.features(self.get_buffer("key"), x.shape[-1]), self.probability)


class Block(nn.Module):
    """`[seq, batch, hidden] -> [seq, batch, hidden]`, pre-norm; `layer` is the global number, from 0.

    apply_residual_connection_post_layernorm takes the residual from the norm's output, as the original BERT does.
    """

    def __init__(self, config: ModelConfig, layer: int, tp: TensorParallel, attend: Attend, *, seed: int) -> None:
        super().__init__()
        self.residual_from_norm = config.apply_residual_connection_post_layernorm
        self.input_norm = make_norm(config, tp)
        self.attention = Attention(config, layer, tp, attend, seed=seed)
        self.after_attention = HiddenDropout(seed, layer, "attention", config.hidden_dropout)
        self.mlp_norm = make_norm(config, tp)
        self.mlp = MLP(config, tp)
        self.after_mlp = HiddenDropout(seed, layer, "mlp", config.hidden_dropout)

    def forward(
        self,
        x: Tensor,
        masks: Masks,
        keys: DropoutKeys | None,
        rotary: Rotary | None = None,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        normed = self.input_norm(x)
        attended = self.attention(normed, masks, rotary, cache)
        x = (normed if self.residual_from_norm else x) + self.after_attention(attended, keys)
        normed = self.mlp_norm(x)
        y: Tensor = (normed if self.residual_from_norm else x) + self.after_mlp(self.mlp(normed), keys)
        return y
