"""A draft head: one decoder layer that guesses further tokens from the target's hidden states (arXiv:2503.01840).

Published EAGLE-3 checkpoints are read, and what `headrace train-drafter` writes: fc.weight, midlayer.*, norm.weight,
d2t (draft token i is token i + d2t[i]), and lm_head.weight or, without it, the target's own rows. The head's state at t
stands for the target's features at t and the token at t + 1; its K and V lie at t in a layer of the cache of their own.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from headrace.engine.batch import ForwardBatch
from headrace.engine.errors import EngineError
from headrace.engine.kv_cache import KVCache
from headrace.engine.model_config import ModelConfig
from headrace.engine.weights import Checkpoint
from headrace.kernels.cache_write import write_cache
from headrace.kernels.gated_activation import gated_activation
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.rope import apply_rope, rope_tables

MAX_HEAD_DEPTH = 8
"""Tokens that a head guesses in a row at most."""


class DraftHead(Protocol):
    """All of it belongs on the engine's thread. States are [T, H] and may be overwritten by the next call."""

    feature_layers: tuple[int, ...]

    def attach(self, cache: KVCache) -> None:
        """Use this cache, whose last layer is the head's."""

    def use_threads(self, threads: int) -> None:
        """How many cores may be used from now on."""

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """First states of features [T, len(feature_layers) * H]."""

    def forward(self, states: torch.Tensor, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """The next states. `batch` has the token after each position; writes the head's K and V to the cache."""

    def write(self, states: torch.Tensor, batch: ForwardBatch, cache: KVCache) -> None:
        """Write the head's K and V as `forward` does, and compute nothing else."""

    def draft(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest token of each state, [T] int64 of the target's vocabulary, and its probability, float32 [T]."""


@dataclass(frozen=True)
class HeadWeights:
    """A head's tensors, [out, in]; `rows` [draft vocabulary, H] is its output projection."""

    feature_layers: tuple[int, ...]
    fc: torch.Tensor
    input_norm: torch.Tensor
    hidden_norm: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    """Gate over up."""
    down: torch.Tensor
    norm: torch.Tensor
    rows: torch.Tensor
    vocabulary: torch.Tensor
    """[draft vocabulary] int64: its tokens."""
    by_frequency: bool = False
    """Those come first that the target says most often."""

    def folded(self) -> HeadWeights:
        """The same with the norms' weights multiplied into the projections behind them, which leaves ones."""
        inputs = torch.cat((self.input_norm, self.hidden_norm))
        one = torch.ones_like(self.norm)
        return replace(
            self,
            qkv=self.qkv * inputs,
            gate_up=self.gate_up * self.mlp_norm,
            rows=self.rows * self.norm,
            input_norm=one,
            hidden_norm=one,
            mlp_norm=one,
            norm=one,
        )


def load_head(
    folder: Path, target_folder: Path, target: ModelConfig, device: torch.device, dtype: torch.dtype
) -> HeadWeights:
    """Read a head for a target. Raises `EngineError` where it is none, or not for such a target."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"--draft-head {folder}: no config.json can be read there ({error})") from error
    layers = raw.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids")
    layers = layers or [2, target.num_layers // 2, target.num_layers - 3]
    with closing(Checkpoint(folder, device, dtype)) as own, closing(Checkpoint(target_folder, device, dtype)) as whole:
        attention, mlp = "midlayer.self_attn.", "midlayer.mlp."
        fc, offsets = own.get("fc.weight"), own.get_as("d2t", torch.int64)
        vocabulary = torch.arange(len(offsets), device=device) + offsets
        qkv = own.stacked(*(f"{attention}{part}_proj.weight" for part in "qkv"))
        expected = (target.num_heads + 2 * target.num_kv_heads) * target.head_dim
        hidden = target.hidden_size
        if fc.shape != (hidden, len(layers) * hidden) or qkv.shape != (expected, 2 * hidden):
            raise EngineError(
                f"--draft-head {folder} is not for this model: a layer of {tuple(qkv.shape)} and {tuple(fc.shape)}, "
                f"where {(expected, 2 * hidden)} and {(hidden, len(layers) * hidden)} fit"
            )
        if int(vocabulary.max()) >= target.vocab_size or max(layers) >= target.num_layers:
            raise EngineError(f"--draft-head {folder} is not for this model: it has other tokens or more layers")
        if "lm_head.weight" in own:
            rows = own.get("lm_head.weight")
        else:
            tied = target.tied_head or "lm_head.weight" not in whole
            rows = whole.get("model.embed_tokens.weight" if tied else "lm_head.weight")[vocabulary]
        return HeadWeights(
            tuple(layers),
            fc,
            own.get("midlayer.input_layernorm.weight"),
            own.get("midlayer.hidden_norm.weight"),
            qkv,
            own.get(attention + "o_proj.weight"),
            own.get("midlayer.post_attention_layernorm.weight"),
            own.stacked(mlp + "gate_proj.weight", mlp + "up_proj.weight"),
            own.get(mlp + "down_proj.weight"),
            own.get("norm.weight"),
            rows,
            vocabulary,
            raw.get("draft_vocab_by_frequency", False),
        )


class TorchHead:
    """See `DraftHead`; beside a `FusedDecoder`."""

    def __init__(self, config: ModelConfig, weights: HeadWeights, embedding: torch.Tensor) -> None:
        self.feature_layers = weights.feature_layers
        self._config = config
        self.weights = weights
        self._embedding = embedding
        self._inverse_frequencies = config.rope.inverse_frequencies().to(embedding.device)

    def attach(self, cache: KVCache) -> None:
        """See `DraftHead`."""

    def use_threads(self, threads: int) -> None:
        """See `DraftHead`: the model has told torch."""

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """See `DraftHead`."""
        return F.linear(features, self.weights.fc)

    def forward(self, states: torch.Tensor, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """See `DraftHead`."""
        config, weights, eps = self._config, self.weights, self._config.norm_eps
        queries, pages = self._write(states, batch, cache), cache.layer(config.num_layers)
        states = states + F.linear(batch.attend(queries, pages, config.head_dim**-0.5), weights.output)
        inner = gated_activation(F.linear(rms_norm(states, weights.mlp_norm, eps), weights.gate_up), config.activation)
        return states + F.linear(inner, weights.down)

    def write(self, states: torch.Tensor, batch: ForwardBatch, cache: KVCache) -> None:
        """See `DraftHead`."""
        self._write(states, batch, cache)

    def _write(self, states: torch.Tensor, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """The same; returns the queries."""
        config, weights, eps = self._config, self.weights, self._config.norm_eps
        heads, kv_heads = config.num_heads, config.num_kv_heads
        pages = cache.layer(config.num_layers)
        embedded = F.embedding(batch.token_ids, self._embedding)
        inputs = torch.cat(
            (rms_norm(embedded, weights.input_norm, eps), rms_norm(states, weights.hidden_norm, eps)), -1
        )
        qkv = F.linear(inputs, weights.qkv)
        by_head = qkv.view(-1, heads + 2 * kv_heads, config.head_dim)
        cos, sin = rope_tables(batch.positions, self._inverse_frequencies, qkv.dtype)
        queries_keys = apply_rope(by_head[:, : heads + kv_heads], cos, sin)
        keys, values = queries_keys[:, heads:], by_head[:, heads + kv_heads :]
        write_cache(keys, values, pages, batch.slot_pages, batch.slot_offsets)
        return queries_keys[:, :heads].contiguous()

    def draft(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DraftHead`."""
        normed = rms_norm(states, self.weights.norm, self._config.norm_eps)
        return likeliest(F.linear(normed, self.weights.rows).float(), self.weights.vocabulary)


def likeliest(logits: torch.Tensor, vocabulary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `DraftHead.draft`; logits float32 [T, draft vocabulary]."""
    probabilities, at = logits.softmax(-1).max(-1)
    return vocabulary[at], probabilities
