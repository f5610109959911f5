"""Decode steps of the fused decoder on a GPU: one CUDA graph a number of rows, with drafts and without."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from headrace.engine.batch import RunningRows
from headrace.engine.draft_head import MAX_HEAD_DEPTH
from headrace.engine.graphs import Graphs
from headrace.engine.kv_cache import KVCache
from headrace.engine.model_config import ModelConfig
from headrace.engine.weights import DecoderWeights, Progress
from headrace.kernels.decode_attention import (
    MAX_STEP_ROWS,
    AttentionWorkspace,
    DraftRows,
    HeadShape,
    fused_decode_attention,
    plan_decode_attention,
)
from headrace.kernels.decode_begin import begin_decode
from headrace.kernels.decode_linear import decode_linear, max_rows
from headrace.kernels.draft_rows import RequestState, StepRows, expand_rows
from headrace.kernels.epilogue import Epilogue, Workspace
from headrace.kernels.fp8_linear import quantize_rows
from headrace.kernels.gated_activation import gated_activation
from headrace.kernels.linear import Projection
from headrace.kernels.rms_norm import add_rms_norm, rms_norm
from headrace.kernels.rope import RopeTables

MAX_DRAFTED_ROWS = 256
"""Of a step with drafts: their logits take memory, and further rows never paid."""
DRAFTED_SIZES = (16, 32, 64, 128, 192, 256)
"""Captured numbers of rows of steps with drafts. Fewer rows than these cost projections as much."""


def batch_sizes(largest: int) -> list[int]:
    """The batch sizes that are captured: close together while a row costs little, at most an eighth apart later on."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + max(8, sizes[-1] // 8 // 8 * 8))
    return [size for size in sizes if size < largest] + [largest]


@dataclass(frozen=True)
class StepInputs:
    """The inputs of a step of `size` rows."""

    size: int
    tokens: torch.Tensor
    positions: torch.Tensor
    drafted: DraftRows | None
    block_table: torch.Tensor
    workspace: AttentionWorkspace


class GraphDecoder:
    """All requests of a running batch: one token of each a step, or several where drafts are verified.

    `state` and `block_table` are the inputs, on the device; a row without a request has position -1. The caller
    advances them. The norms' weights must have been folded into the projections that follow them.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        cache: KVCache,
        max_batch: int,
        max_model_len: int,
        *,
        drafts: bool = False,
        feature_layers: tuple[int, ...] = (),
    ) -> None:
        """`drafts`: steps may verify drafts, and then keep `features` of these layers for a draft head."""
        device, dtype = weights.embedding.device, weights.embedding.dtype
        self._config = config
        self._weights = weights
        self.cache = cache
        self.heads = HeadShape(
            config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim, config.rope.rotary_dim
        )
        positions = torch.arange(max_model_len, device=device)
        self.rope = RopeTables.at(positions, config.rope.inverse_frequencies().to(device))
        self.linear_workspace = Workspace(device)
        most = min(max_batch * MAX_STEP_ROWS, max(MAX_DRAFTED_ROWS, max_batch)) if drafts else max_batch
        self.attention_workspace = AttentionWorkspace(self.heads, max_batch, device)
        self.drafted_workspace = AttentionWorkspace(self.heads, most, device, drafted=True)
        width = -(-max_model_len // cache.layout.page_size)
        # one page more than the longest request has: kernels look up whole blocks of tokens
        width += -(-self.attention_workspace.block // cache.layout.page_size)
        self.state = RequestState.empty(max_batch, MAX_HEAD_DEPTH, device)
        self.rows = StepRows(most, device)
        """Of a step with drafts, see `step_drafted`."""
        self.block_table = torch.zeros(max_batch, width, dtype=torch.int32, device=device)
        self.limits = torch.zeros(max_batch, dtype=torch.int32, device=device)
        """Positions that each request has pages for: a draft head goes no further."""
        qkv_size = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self._squares = torch.zeros(2 * config.num_layers + 1, most, dtype=torch.int64, device=device)
        self._residual = torch.zeros(most, config.hidden_size, dtype=dtype, device=device)
        self.max_narrow = max_rows(device)
        self._qkv = torch.zeros(min(most, self.max_narrow), qkv_size, dtype=dtype, device=device)
        self._attended = torch.zeros(most, config.num_heads * config.head_dim, dtype=dtype, device=device)
        self._activated = torch.zeros(len(self._qkv), config.intermediate_size, dtype=dtype, device=device)
        self._logits = torch.zeros(most, config.vocab_size, dtype=torch.float32, device=device)
        self._sizes = {False: batch_sizes(max_batch)}
        """By whether there are drafts."""
        if drafts:
            self._sizes[True] = [size for size in DRAFTED_SIZES if size < most] + [most]
        self.graphs = Graphs(device)
        self._feature_layers = feature_layers
        self.features = torch.zeros(most, len(feature_layers) * config.hidden_size, dtype=dtype, device=device)
        """[rows, len(feature_layers) * H]: the inputs of these layers in the last step with drafts."""

    def sizes(self, *, drafted: bool = False) -> list[int]:
        """The numbers of rows that are captured, in order."""
        return self._sizes[drafted]

    def capture_all(self, progress: Progress) -> None:
        """Compile the kernels and capture every size, the largest first, whose memory the others then share."""
        wanted = sorted(((size, drafted) for drafted, sizes in self._sizes.items() for size in sizes), reverse=True)
        for done, (size, drafted) in enumerate(wanted):
            self.graphs.capture((size, drafted), partial(self._forward, size, drafted))
            progress("capturing decode steps", (done + 1) / len(wanted))

    def step(self, rows: int) -> torch.Tensor:
        """Start the step of the first `rows` requests; returns their logits, float32 [rows, vocabulary]."""
        return self._run(rows, drafted=False)

    def step_drafted(self, rows: int) -> torch.Tensor:
        """Start a step of `rows` rows as `self.rows.layout` has them, which must be -1 beyond; returns their logits.

        What follows from the layout is filled in `self.rows`; `accept_rows` brings `state` up to date afterwards.
        """
        return self._run(rows, drafted=True)

    def _run(self, rows: int, drafted: bool) -> torch.Tensor:
        size = next(size for size in self._sizes[drafted] if size >= rows)
        self.graphs.run((size, drafted), partial(self._forward, size, drafted))
        return self._logits[:rows]

    def inputs(self, size: int, drafted: bool) -> StepInputs:
        """Where a step of `size` rows finds them."""
        if drafted:
            rows, workspace = self.rows, self.drafted_workspace
            return StepInputs(
                size, rows.tokens[:size], rows.positions[:size], rows.drafted.up_to(size), self.block_table, workspace
            )
        tokens, positions, table = self.state.tokens, self.state.positions, self.block_table
        return StepInputs(size, tokens[:size], positions[:size], None, table[:size], self.attention_workspace)

    def _forward(self, size: int, drafted: bool) -> None:
        if drafted:
            expand_rows(self.state, self.rows)
        step = self.inputs(size, drafted)
        plan_decode_attention(step.positions, step.workspace, step.drafted)
        begin_decode(
            step.tokens,
            self._weights.embedding,
            self._config.embedding_scale,
            self._residual[:size],
            self._squares[:, :size],
        )
        if size <= self.max_narrow:
            self._forward_narrow(step)
        else:
            self._forward_wide(step)

    def _forward_narrow(self, step: StepInputs) -> None:
        """Few rows: every projection at the memory's speed, with what surrounds it."""
        size = step.size
        eps, residual, activated = self._config.norm_eps, self._residual[:size], self._activated[:size]
        qkv = self._qkv[:size]
        squares = iter(self._squares[:, :size])
        sums = next(squares)
        for index, layer in enumerate(self._weights.layers):
            self._keep_features(step, index)
            self._project(residual, layer.qkv, qkv, squares=sums, eps=eps, bias=layer.qkv.bias)
            attended = self._attend(step, index, qkv)
            sums = next(squares)
            self._project(attended, layer.output, residual, bias=layer.output.bias, residual=True, squares_out=sums)
            activation = self._config.activation
            self._project(residual, layer.gate_up, activated, squares=sums, eps=eps, activation=activation)
            sums = next(squares)
            self._project(activated, layer.down, residual, residual=True, squares_out=sums)
        hidden = rms_norm(residual, self._weights.norm, eps)
        decode_linear(hidden, self._weights.head.weight, self._logits[:size], Epilogue(), self.linear_workspace)

    def _keep_features(self, step: StepInputs, index: int) -> None:
        if step.drafted is not None and index in self._feature_layers:
            place, hidden = self._feature_layers.index(index), self._config.hidden_size
            self.features[: step.size, place * hidden : (place + 1) * hidden] = self._residual[: step.size]

    def _project(self, x: torch.Tensor, projection: Projection, out: torch.Tensor, **epilogue: Any) -> None:
        """One projection with its surroundings, see `Epilogue`."""
        x_scale = None
        if projection.weight_scale is not None and len(x) > 1:
            x, x_scale = quantize_rows(x)
        surroundings = Epilogue(weight_scale=projection.weight_scale, x_scale=x_scale, **epilogue)
        decode_linear(x, projection.weight, out, surroundings, self.linear_workspace)

    def running(self, requests: int) -> RunningRows:
        """The first `requests` ones, for a forward pass that computes prompts, too, instead of a step."""
        step = self.inputs(requests, drafted=False)
        plan_decode_attention(step.positions, step.workspace)
        return _Running(self, step)

    def _attend(self, step: StepInputs, index: int, qkv: torch.Tensor) -> torch.Tensor:
        layer, attended = self._weights.layers[index], self._attended[: step.size]
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        fused_decode_attention(
            qkv,
            self.cache.layer(index),
            step.block_table,
            step.positions,
            self.rope,
            norms,
            self._config.norm_eps,
            attended,
            self.heads,
            step.workspace,
            step.drafted,
        )
        return attended

    def _forward_wide(self, step: StepInputs) -> None:
        """Many rows: bound by arithmetic, so the projections are cuBLAS's."""
        size = step.size
        eps, weights, residual = self._config.norm_eps, self._weights, self._residual[:size]
        hidden = rms_norm(residual, weights.layers[0].input_norm, eps)
        for index, layer in enumerate(weights.layers):
            self._keep_features(step, index)
            attended = self._attend(step, index, layer.qkv(hidden))
            hidden = add_rms_norm(layer.output(attended), residual, layer.mlp_norm, eps)
            hidden = layer.down(gated_activation(layer.gate_up(hidden), self._config.activation))
            last = index + 1 == len(weights.layers)
            hidden = add_rms_norm(hidden, residual, weights.norm if last else weights.layers[index + 1].input_norm, eps)
        weights.head.to_float32(hidden, self._logits[:size])


@dataclass(frozen=True)
class _Running:
    """See `RunningRows`."""

    decoder: GraphDecoder
    step: StepInputs

    @property
    def token_ids(self) -> torch.Tensor:
        return self.step.tokens

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        return self.decoder._attend(self.step, layer, qkv)
