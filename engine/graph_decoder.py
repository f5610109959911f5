"""Decode steps of the fused decoder on a GPU: one CUDA graph a batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from headrace.engine.kv_cache import KVCache
from headrace.engine.model_config import ModelConfig
from headrace.engine.weights import DecoderWeights, Progress
from headrace.kernels.decode_attention import (
    AttentionWorkspace,
    HeadShape,
    fused_decode_attention,
    plan_decode_attention,
)
from headrace.kernels.decode_begin import begin_decode
from headrace.kernels.decode_linear import decode_linear, max_rows
from headrace.kernels.epilogue import Epilogue, Workspace
from headrace.kernels.fp8_linear import quantize_rows
from headrace.kernels.gated_activation import gated_activation
from headrace.kernels.linear import Projection
from headrace.kernels.rms_norm import add_rms_norm, rms_norm
from headrace.kernels.rope import RopeTables


def batch_sizes(largest: int) -> list[int]:
    """The batch sizes that are captured: close together while a row costs little, at most an eighth apart later on."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + max(8, sizes[-1] // 8 // 8 * 8))
    return [size for size in sizes if size < largest] + [largest]


class GraphDecoder:
    """All rows of a running batch, one token a row and step.

    `tokens`, `positions` and `block_table` are the inputs, on the device; a row without a request has position -1. The
    caller advances them. The norms' weights must have been folded into the projections that follow them.
    """

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, cache: KVCache, max_batch: int, max_model_len: int
    ) -> None:
        device, dtype = weights.embedding.device, weights.embedding.dtype
        self._config = config
        self._weights = weights
        self._cache = cache
        self._heads = HeadShape(
            config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim, config.rope.rotary_dim
        )
        positions = torch.arange(max_model_len, device=device)
        self._rope = RopeTables.at(positions, config.rope.inverse_frequencies().to(device))
        self._linear_workspace = Workspace(device)
        self._attention_workspace = AttentionWorkspace(self._heads, max_batch, device)
        width = -(-max_model_len // cache.layout.page_size)
        # one page more than the longest request has: kernels look up whole blocks of tokens
        width += -(-self._attention_workspace.block // cache.layout.page_size)
        self.tokens = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.positions = torch.full((max_batch,), -1, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(max_batch, width, dtype=torch.int32, device=device)
        qkv_size = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self._squares = torch.zeros(2 * config.num_layers + 1, max_batch, dtype=torch.int64, device=device)
        self._residual = torch.zeros(max_batch, config.hidden_size, dtype=dtype, device=device)
        self._max_narrow = max_rows(device)
        self._qkv = torch.zeros(min(max_batch, self._max_narrow), qkv_size, dtype=dtype, device=device)
        self._attended = torch.zeros(max_batch, config.num_heads * config.head_dim, dtype=dtype, device=device)
        self._activated = torch.zeros(len(self._qkv), config.intermediate_size, dtype=dtype, device=device)
        self._logits = torch.zeros(max_batch, config.vocab_size, dtype=torch.float32, device=device)
        self._sizes = batch_sizes(max_batch)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture_all(self, progress: Progress) -> None:
        """Compile the kernels and capture every batch size, the largest first, whose memory the others then share."""
        for done, size in enumerate(reversed(self._sizes)):
            self._graph(size)
            progress("capturing decode steps", (done + 1) / len(self._sizes))

    def step(self, rows: int) -> torch.Tensor:
        """Start the step of the first `rows` rows; returns their logits, float32 [rows, vocabulary]."""
        size = next(size for size in self._sizes if size >= rows)
        if self.tokens.is_cuda:
            self._graph(size).replay()
        else:
            self._forward(size)
        return self._logits[:rows]

    def _graph(self, size: int) -> torch.cuda.CUDAGraph:
        if size not in self._graphs:
            self._forward(size)  # compiles what was not
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None
            # a graph's kernels keep the priority of the stream that they were captured on
            with torch.cuda.graph(graph, pool=pool):
                self._forward(size)
            self._graphs[size] = graph
        return self._graphs[size]

    def _forward(self, size: int) -> None:
        plan_decode_attention(self.positions[:size], self._attention_workspace)
        begin_decode(
            self.tokens[:size],
            self._weights.embedding,
            self._config.embedding_scale,
            self._residual[:size],
            self._squares[:, :size],
        )
        if size <= self._max_narrow:
            self._forward_narrow(size)
        else:
            self._forward_wide(size)

    def _forward_narrow(self, size: int) -> None:
        """Few rows: every projection at the memory's speed, with what surrounds it."""
        eps, residual, activated = self._config.norm_eps, self._residual[:size], self._activated[:size]
        qkv = self._qkv[:size]
        squares = iter(self._squares[:, :size])
        sums = next(squares)
        for index, layer in enumerate(self._weights.layers):
            self._project(residual, layer.qkv, qkv, squares=sums, eps=eps, bias=layer.qkv.bias)
            attended = self.attend(index, qkv)
            sums = next(squares)
            self._project(attended, layer.output, residual, bias=layer.output.bias, residual=True, squares_out=sums)
            activation = self._config.activation
            self._project(residual, layer.gate_up, activated, squares=sums, eps=eps, activation=activation)
            sums = next(squares)
            self._project(activated, layer.down, residual, residual=True, squares_out=sums)
        hidden = rms_norm(residual, self._weights.norm, eps)
        decode_linear(hidden, self._weights.head.weight, self._logits[:size], Epilogue(), self._linear_workspace)

    def _project(self, x: torch.Tensor, projection: Projection, out: torch.Tensor, **epilogue: Any) -> None:
        """One projection with its surroundings, see `Epilogue`."""
        x_scale = None
        if projection.weight_scale is not None and len(x) > 1:
            x, x_scale = quantize_rows(x)
        surroundings = Epilogue(weight_scale=projection.weight_scale, x_scale=x_scale, **epilogue)
        decode_linear(x, projection.weight, out, surroundings, self._linear_workspace)

    def running(self, rows: int) -> _Rows:
        """The first `rows` rows, for a forward pass that computes prompts, too, instead of a step."""
        plan_decode_attention(self.positions[:rows], self._attention_workspace)
        return _Rows(self, rows)

    def attend(self, index: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `RunningRows.attend`; for the rows that were planned."""
        size, layer = len(qkv), self._weights.layers[index]
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        fused_decode_attention(
            qkv,
            self._cache.layer(index),
            self.block_table[:size],
            self.positions[:size],
            self._rope,
            norms,
            self._config.norm_eps,
            self._attended[:size],
            self._heads,
            self._attention_workspace,
        )
        return self._attended[:size]

    def _forward_wide(self, size: int) -> None:
        """Many rows: bound by arithmetic, so the projections are cuBLAS's."""
        eps, weights, residual = self._config.norm_eps, self._weights, self._residual[:size]
        hidden = rms_norm(residual, weights.layers[0].input_norm, eps)
        for index, layer in enumerate(weights.layers):
            attended = self.attend(index, layer.qkv(hidden))
            hidden = add_rms_norm(layer.output(attended), residual, layer.mlp_norm, eps)
            hidden = layer.down(gated_activation(layer.gate_up(hidden), self._config.activation))
            last = index + 1 == len(weights.layers)
            hidden = add_rms_norm(hidden, residual, weights.norm if last else weights.layers[index + 1].input_norm, eps)
        weights.head.to_float32(hidden, self._logits[:size])


@dataclass(frozen=True)
class _Rows:
    """See `RunningRows`."""

    decoder: GraphDecoder
    count: int

    @property
    def token_ids(self) -> torch.Tensor:
        return self.decoder.tokens[: self.count]

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        return self.decoder.attend(layer, qkv)
