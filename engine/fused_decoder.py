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
from headrace.kernels.linear import Linear, Projection
from headrace.kernels.prefill_attention import TilePlan
from headrace.kernels.rms_norm import add_rms_norm, rms_factors, rms_norm
from headrace.kernels.rope import RopeTables, apply_rope, rope_tables
from headrace.kernels.rope_cache import rope_cache

Writer = Callable[[LayerWeights, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Of a layer, its packed projection, its pages and factors of the rows; returns queries."""


class FusedDecoder:
    """Packed QKV and gate/up projections, paged attention, and residual sums folded into the norms that follow them.

    Where the norms' weights are in the projections, a norm is a factor a row: projections read the residual stream as
    it is, what follows them applies the factors, and the output and down projections add to the stream themselves.
    """

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
        # float16 would not hold what projections make of a stream that is not normalised
        self.norms_are_late = norms_are_folded and all(
            isinstance(each, Linear) and each.bias is None and each.weight.dtype != torch.float16
            for layer in weights.layers
            for each in (layer.qkv, layer.output, layer.gate_up, layer.down)
        )

    def forward(self, batch: ForwardBatch, cache: PagedLayers, on_layer: OnLayer | None) -> torch.Tensor:
        """See `Model.forward`."""
        config, weights = self._config, self.weights
        residual = embedding(batch.token_ids, weights.embedding)
        if config.embedding_scale != 1.0:
            residual = residual * torch.tensor(config.embedding_scale, dtype=residual.dtype)
        write = self._writer(batch, residual.dtype)
        features = []
        hidden, factors = self._normed(residual, weights.layers[0].input_norm)
        for index, layer in enumerate(weights.layers):
            if index in self.feature_layers:
                features.append(residual.clone())
            pages = cache.layer(index)
            qkv = layer.qkv(hidden)
            queries = write(layer, qkv, pages, factors)
            if on_layer is not None:
                on_layer(index)
            last = index + 1 == len(weights.layers)
            if last and features:
                self.features = torch.cat(features, -1)
            if last and batch.wanted is not None and len(batch.wanted) == 0:
                return residual[:0]
            attended = batch.attend(queries, pages, self._scale, qkv)
            if last and batch.wanted is not None:  # of the others, K and V are all that is ever read
                attended, residual = attended.index_select(0, batch.wanted), residual.index_select(0, batch.wanted)
            hidden, factors = self._add(layer.output, attended, residual, layer.mlp_norm)
            hidden = gated_activation(layer.gate_up(hidden), config.activation, factors)
            next_norm = weights.norm if last else weights.layers[index + 1].input_norm
            hidden, factors = self._add(layer.down, hidden, residual, next_norm)
        return hidden if factors is None else rms_norm(residual, weights.norm, config.norm_eps)

    def _normed(self, residual: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the next projection reads, and by what its rows are to be multiplied afterwards."""
        if self.norms_are_late:
            return residual, rms_factors(residual, self._config.norm_eps)
        return rms_norm(residual, norm, self._config.norm_eps), None

    def _add(
        self, projection: Projection, x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same, after projection(x) was added to the residual stream in place."""
        if self.norms_are_late:
            torch.addmm(residual, x, projection.weight.T, out=residual)
            return self._normed(residual, norm)
        return add_rms_norm(projection(x), residual, norm, self._config.norm_eps), None

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
        factors: torch.Tensor | None,
    ) -> torch.Tensor:
        """Rotate, one operation at a time, and write to the cache; returns queries [T, heads, head_dim]."""
        config = self._config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        if factors is not None:
            qkv *= factors.unsqueeze(1)
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
        factors: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same in one kernel; `keep_keys` leaves the rotated keys in `qkv`, too."""
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        slots, eps = (batch.slot_pages, batch.slot_offsets), self._config.norm_eps
        return rope_cache(qkv, rows, rope, norms, eps, pages, *slots, keep_keys=keep_keys, factors=factors)

    def use_threads(self, threads: int) -> None:
        """See `Model.use_threads`."""
        torch.set_num_threads(threads)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Model.logits`."""
        return self.weights.head(hidden).float()
