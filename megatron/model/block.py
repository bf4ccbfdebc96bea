"""One transformer layer: attention and MLP, each on a residual line."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.model.attention import Attention, AttentionCache, AttentionContext, CoreAttention
from megatron.model.mlp import MLP
from megatron.model.norm import make_norm
from megatron.model.rotary import Rotary
from megatron.parallel.cost import ActivationBytes, MicroBatchShape
from megatron.parallel.random import DropoutKeys, drop, site_key
from megatron.parallel.tensor_parallel import TensorParallel


class HiddenDropout(nn.Module):
    """Dropout of the residual stream at one site of the model, with masks that do not depend on the layout."""

    def __init__(self, seed: int, layer: int, site: str, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.register_buffer("key", site_key(seed, layer, site), persistent=False)

    def activation_bytes(self, shape: MicroBatchShape) -> ActivationBytes:
        """Return the bytes of its mask, one for each element."""
        return ActivationBytes(saved=shape.hidden_elements if self.probability > 0.0 else 0)

    def forward(self, x: Tensor, keys: DropoutKeys | None) -> Tensor:
        """Drop features of x `[seq, batch, hidden]`. keys: the random keys of x's tokens; None outside training."""
        if keys is None or self.probability == 0.0:
            return x
        numbers = keys.features(self.get_buffer("key"), x.shape[-1])  # [seq, batch, hidden]
        return drop(x, numbers, self.probability)  # [seq, batch, hidden]


class Block(nn.Module):
    """A pre-norm layer, `[seq, batch, hidden] -> [seq, batch, hidden]`; `layer` is its global number, from 0.

        x = x + dropout(attention(norm(x)))
        x = x + dropout(mlp(norm(x)))

    With apply_residual_connection_post_layernorm, x on the right is the output of the norm, as in the original BERT.
    """

    def __init__(
        self, config: ModelConfig, layer: int, tp: TensorParallel, core_attention: CoreAttention, *, seed: int
    ) -> None:
        super().__init__()
        self.residual_from_norm = config.apply_residual_connection_post_layernorm
        self.input_norm = make_norm(config, tp)
        self.attention = Attention(config, layer, tp, core_attention, seed=seed)
        self.after_attention = HiddenDropout(seed, layer, "attention", config.hidden_dropout)
        self.mlp_norm = make_norm(config, tp)
        self.mlp = MLP(config, tp)
        self.after_mlp = HiddenDropout(seed, layer, "mlp", config.hidden_dropout)

    def forward(
        self,
        x: Tensor,
        context: AttentionContext,
        keys: DropoutKeys | None,
        rotary: Rotary | None = None,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """Run attention and MLP.

        Args:
            x: `[seq, batch, hidden]`.
            context: attention's mask and dropout.
            keys: the random keys of x's tokens, for dropout of the residual stream; None outside training.
            rotary: rotation of queries and keys; None with learned positions.
            cache: keys and values of earlier tokens; None in training.

        Returns:
            A tensor like x.
        """
        normed = self.input_norm(x)  # [seq, batch, hidden]
        attended = self.attention(normed, context, rotary, cache)  # [seq, batch, hidden]
        x = (normed if self.residual_from_norm else x) + self.after_attention(attended, keys)  # [seq, batch, hidden]
        normed = self.mlp_norm(x)  # [seq, batch, hidden]
        y: Tensor = (normed if self.residual_from_norm else x) + self.after_mlp(self.mlp(normed), keys)  # [seq, batch, hidden]
        return y
