"""The draft head as a module that learns; its parameters have the names of published EAGLE-3 checkpoints."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from headrace.engine.model_config import ModelConfig
from headrace.engine.weights import Checkpoint
from headrace.kernels.round_weights import round_to_4_bits

EMBEDDING_SHARE = 0.02
"""Size, beside the target's own weights, of what the projections of the token's embedding start from."""

LIKE_THE_TARGETS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    "post_attention_layernorm",
)


class Norm(nn.Module):
    """RMS norm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] to float32's or autocast's kind of the same."""
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self._eps)


class Projection(nn.Module):
    """x @ weight.T, with the weight rounded to 4 bits once `rounds` is set: gradients pass the rounding by."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)
        self.rounds = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        weight: torch.Tensor = self.weight
        if self.rounds:
            weight = weight + (round_to_4_bits(weight.detach()) - weight.detach())
        return F.linear(x, weight.to(x.dtype))


class HeadModule(nn.Module):
    """One decoder layer over the target's fused hidden states (arXiv:2503.01840), for training.

    `forward` unrolls it: the first pass sees the target's features, each further one what the pass before gave in their
    place, as when it drafts.
    """

    def __init__(self, config: ModelConfig, num_features: int) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self._config = config
        self.fc = Projection(num_features * hidden, hidden)
        self.midlayer = nn.ModuleDict(
            {
                "input_layernorm": Norm(hidden, config.norm_eps),
                "hidden_norm": Norm(hidden, config.norm_eps),
                "self_attn": nn.ModuleDict(
                    {
                        "q_proj": Projection(2 * hidden, heads),
                        "k_proj": Projection(2 * hidden, kv_heads),
                        "v_proj": Projection(2 * hidden, kv_heads),
                        "o_proj": Projection(heads, hidden),
                    }
                ),
                "post_attention_layernorm": Norm(hidden, config.norm_eps),
                "mlp": nn.ModuleDict(
                    {
                        "gate_proj": Projection(hidden, inner),
                        "up_proj": Projection(hidden, inner),
                        "down_proj": Projection(inner, hidden),
                    }
                ),
            }
        )
        self.norm = Norm(hidden, config.norm_eps)
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", config.rope.inverse_frequencies(), persistent=False)

    @torch.no_grad()
    def start_from(self, checkpoint: Checkpoint) -> None:
        """Take the target's last layer, fed with the highest feature alone: a better start than random weights.

        What the checkpoint stores in another form stays random.
        """
        hidden, own = self._config.hidden_size, dict(self.named_parameters())
        self.fc.weight.mul_(EMBEDDING_SHARE)
        self.fc.weight[:, -hidden:] += torch.eye(hidden, device=self.fc.weight.device)
        last = f"model.layers.{self._config.num_layers - 1}."
        sources = {f"midlayer.{part}.weight": f"{last}{part}.weight" for part in LIKE_THE_TARGETS}
        sources |= {"midlayer.hidden_norm.weight": f"{last}input_layernorm.weight", "norm.weight": "model.norm.weight"}
        for name, source in sources.items():
            if source not in checkpoint:
                continue
            weight, taken = own[name], checkpoint.get(source)
            if weight.dim() == 2 and weight.shape[1] > taken.shape[1]:  # beside the token's embedding
                weight[:, :-hidden] *= EMBEDDING_SHARE
                weight[:, -hidden:] = taken
            else:
                weight.copy_(taken)

    def round_weights(self) -> None:
        """From now on, projections have 4 bits, as where the head will run."""
        for module in self.modules():
            if isinstance(module, Projection):
                module.rounds = True

    def forward(self, features: torch.Tensor, embedded: torch.Tensor, passes: int) -> list[torch.Tensor]:
        """Normalised states [B, T, hidden] of each pass, from features [B, T, num * hidden] and embedded tokens.

        embedded [B, T + passes, hidden]: token t + 1 at t. Pass k's state at t is what the token after t + k + 2 is
        drafted from, counting from 0.
        """
        length = features.shape[1]
        state = self.fc(features)
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        states = []
        for step in range(passes):
            state = self._layer(state, embedded[:, step : step + length], step, keys, values)
            states.append(self.norm(state))
        return states

    def _layer(
        self,
        state: torch.Tensor,
        embedded: torch.Tensor,
        step: int,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> torch.Tensor:
        layer: Any = self.midlayer
        attention, mlp = layer["self_attn"], layer["mlp"]
        inputs = torch.cat((layer["input_layernorm"](embedded), layer["hidden_norm"](state)), -1)
        query = self._rotated(attention["q_proj"](inputs), step)
        keys.append(self._rotated(attention["k_proj"](inputs), step))
        values.append(self._by_head(attention["v_proj"](inputs)))
        state = state + attention["o_proj"](_attend(query, keys, values))
        inputs = layer["post_attention_layernorm"](state)
        inner = F.silu(mlp["gate_proj"](inputs)) * mlp["up_proj"](inputs)
        moved: torch.Tensor = state + mlp["down_proj"](inner)
        return moved

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, heads * size] to [B, heads, T, size]."""
        return x.view(*x.shape[:2], -1, self._config.head_dim).transpose(1, 2)

    def _rotated(self, x: torch.Tensor, step: int) -> torch.Tensor:
        by_head = self._by_head(x)
        positions = torch.arange(step, step + by_head.shape[2], device=x.device)
        angles = positions.float().unsqueeze(1) * self.frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        rotary = 2 * cos.shape[1]
        one, other = by_head[..., :rotary].chunk(2, -1)
        rotated = torch.cat((one * cos - other * sin, other * cos + one * sin), -1)
        return rotated if rotary == x.shape[-1] else torch.cat((rotated, by_head[..., rotary:]), -1)


def _attend(query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """Each query sees the first pass's keys up to its own place, and of further passes those at its place.

    query [B, heads, T, size]; keys and values of each pass, [B, KV heads, T, size]. Returns [B, T, heads * size].
    """
    group = query.shape[1] // keys[0].shape[1]
    if len(keys) == 1:
        key, value = (one[0].repeat_interleave(group, 1) for one in (keys, values))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).flatten(2)
    by_group = query.reshape(len(query), -1, group, *query.shape[2:]) * query.shape[-1] ** -0.5
    scores = by_group @ keys[0].unsqueeze(2).transpose(-1, -2)
    length = scores.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = scores.masked_fill(future, float("-inf"))
    own = [(by_group * key.unsqueeze(2)).sum(-1, keepdim=True) for key in keys[1:]]
    weights = torch.cat((scores, *own), -1).softmax(-1, dtype=torch.float32).to(query.dtype)
    attended = weights[..., :length] @ values[0].unsqueeze(2)
    for at, value in enumerate(values[1:], length):
        attended = attended + weights[..., at : at + 1] * value.unsqueeze(2)
    return attended.flatten(1, 2).transpose(1, 2).flatten(2)
