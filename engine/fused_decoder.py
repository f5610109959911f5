"""One configurable decoder for Llama and the families that differ from it by a flag."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import embedding

from headrace.engine.base import OnLayer
from headrace.engine.batch import ForwardBatch
from headrace.engine.kv_cache import PagedLayers
from headrace.engine.model_config import ModelConfig
from headrace.engine.weights import DecoderWeights, LayerWeights
from headrace.kernels.cache_write import write_cache
from headrace.kernels.gated_activation import gated_activation
from headrace.kernels.prefill_attention import TilePlan
from headrace.kernels.rms_norm import add_rms_norm, rms_norm
from headrace.kernels.rope import RopeTables, apply_rope, rope_tables
from headrace.kernels.rope_cache import rope_cache

Writer = Callable[[LayerWeights, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of a layer, its packed projection and its pages; returns queries."""


class FusedDecoder:
    """Packed QKV and gate/up projections, paged attention, and residual sums folded into the norms that follow them."""

    follows_tables = False
    prompt_tokens: int | None = None
    cache_dtype: torch.dtype | None = None

    def __init__(self, config: ModelConfig, weights: DecoderWeights, *, norms_are_folded: bool = False) -> None:
        self.weights = weights
        self.norms_are_folded = norms_are_folded
        self.feature_layers: tuple[int, ...] = ()
        self.features = weights.embedding.new_empty(0, 0)
        self._config = config
        self._inverse_frequencies = config.rope.inverse_frequencies().to(weights.embedding.device)
        self._scale = config.head_dim**-0.5

    def forward(self, batch: ForwardBatch, cache: PagedLayers, on_layer: OnLayer | None) -> torch.Tensor:
        """See `Model.forward`."""
        config, weights = self._config, self.weights
        residual = embedding(batch.token_ids, weights.embedding)
        if config.embedding_scale != 1.0:
            residual = residual * torch.tensor(config.embedding_scale, dtype=residual.dtype)
        write = self._writer(batch, residual.dtype)
        features = []
        hidden = rms_norm(residual, weights.layers[0].input_norm, config.norm_eps)
        for index, layer in enumerate(weights.layers):
            if index in self.feature_layers:
                features.append(residual.clone())
            pages = cache.layer(index)
            qkv = layer.qkv(hidden)
            queries = write(layer, qkv, pages)
            if on_layer is not None:
                on_layer(index)
            hidden = layer.output(batch.attend(queries, pages, self._scale, qkv))
            hidden = add_rms_norm(hidden, residual, layer.mlp_norm, config.norm_eps)
            hidden = layer.down(gated_activation(layer.gate_up(hidden), config.activation))
            last = index + 1 == len(weights.layers)
            next_norm = weights.norm if last else weights.layers[index + 1].input_norm
            hidden = add_rms_norm(hidden, residual, next_norm, config.norm_eps)
        if features:
            self.features = torch.cat(features, -1)
        return hidden

    def _writer(self, batch: ForwardBatch, dtype: torch.dtype) -> Writer:
        """What all layers of a forward do between the packed projection and attention."""
        if isinstance(batch.plan, TilePlan):
            rope = RopeTables.at(batch.positions, self._inverse_frequencies)
            rows = torch.arange(len(batch.positions), device=batch.positions.device)
            return partial(self._write_fused, batch, rope, rows, not batch.plan.has_prefix)
        cos, sin = rope_tables(batch.positions, self._inverse_frequencies, dtype)
        return partial(self._write, batch, cos, sin)

    def _write(
        self,
        batch: ForwardBatch,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layer: LayerWeights,
        qkv: torch.Tensor,
        pages: torch.Tensor,
    ) -> torch.Tensor:
        """Rotate, one operation at a time, and write to the cache; returns queries [T, heads, head_dim]."""
        config = self._config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        by_head = qkv.view(-1, heads + 2 * kv_heads, config.head_dim)
        queries_keys, values = by_head[:, : heads + kv_heads], by_head[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            normed = (
                rms_norm(queries_keys[:, :heads], layer.q_norm, config.norm_eps),
                rms_norm(queries_keys[:, heads:], layer.k_norm, config.norm_eps),
            )
            queries_keys = torch.cat(normed, 1)
        queries_keys = apply_rope(queries_keys, cos, sin)
        write_cache(queries_keys[:, heads:], values, pages, batch.slot_pages, batch.slot_offsets)
        return queries_keys[:, :heads].contiguous()

    def _write_fused(
        self,
        batch: ForwardBatch,
        rope: RopeTables,
        rows: torch.Tensor,
        keep_keys: bool,
        layer: LayerWeights,
        qkv: torch.Tensor,
        pages: torch.Tensor,
    ) -> torch.Tensor:
        """The same in one kernel; `keep_keys` leaves the rotated keys in `qkv`, too."""
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        slots = (batch.slot_pages, batch.slot_offsets)
        return rope_cache(qkv, rows, rope, norms, self._config.norm_eps, pages, *slots, keep_keys=keep_keys)

    def use_threads(self, threads: int) -> None:
        """See `Model.use_threads`."""
        torch.set_num_threads(threads)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Model.logits`."""
        return self.weights.head(hidden).float()
