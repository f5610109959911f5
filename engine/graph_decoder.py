"""Decode steps of the fused decoder on a GPU: a CUDA graph a number of rows, with drafts, prompts or neither."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from headrace.engine.draft_head import MAX_HEAD_DEPTH
from headrace.engine.graphs import Graphs
from headrace.engine.kv_cache import KVCache
from headrace.engine.model_config import ModelConfig
from headrace.engine.prompt_rows import MAX_PROMPTS, PromptRows
from headrace.engine.weights import DecoderWeights, Progress
from headrace.kernels.attention_plan import (
    MAX_STEP_ROWS,
    AttentionWorkspace,
    DraftRows,
    HeadShape,
    plan_decode_attention,
)
from headrace.kernels.decode_attention import fused_decode_attention
from headrace.kernels.decode_begin import begin_decode
from headrace.kernels.decode_linear import decode_linear, max_rows
from headrace.kernels.draft_rows import RequestState, StepRows, expand_rows
from headrace.kernels.epilogue import Epilogue, Workspace
from headrace.kernels.fp8_linear import quantize_rows
from headrace.kernels.gated_activation import gated_activation
from headrace.kernels.linear import Projection
from headrace.kernels.prefill_attention import attend_paged
from headrace.kernels.rms_norm import add_rms_norm, rms_norm
from headrace.kernels.rope import RopeTables
from headrace.kernels.rope_cache import rope_cache

if TYPE_CHECKING:
    from headrace.engine.engine import PrefillChunk

Kind = Literal["plain", "drafted", "shared", "prompts"]
"""Of a step: one row a request, or with drafts, or with rows of prompts; or these alone."""
Started = Callable[[int], None]
"""Hears, while a pass is being started, how many layers' K and V are written by what was started so far."""
MAX_DRAFTED_ROWS = 256
"""Of a step with drafts: their logits take memory, and further rows never paid."""
DRAFTED_SIZES = (8, 16, 32, 64, 128, 192, 256)
"""Captured numbers of rows of steps with drafts. Fewer rows than these cost projections as much."""
SHARED_SIZES = (64, 128, 192, 256, 320, 384, 512, 640, 768, 1024)
"""Captured numbers of rows of steps with prompts, those of running requests among them."""
PART_LAYERS = 8
"""Of a graph of a pass of prompts alone, after each of which pages may travel."""


def batch_sizes(largest: int) -> list[int]:
    """The batch sizes that are captured: close together while a row costs little, at most an eighth apart later on."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + max(8, sizes[-1] // 8 // 8 * 8))
    return [size for size in sizes if size < largest] + [largest]


@contextmanager
def _library(name: str) -> Iterator[None]:
    """Which library products inside the block are taken from.

    Of an 8B shape on an H100, cuBLASLt chose better tiles for up to 512 rows: 7.8 instead of 8.35 ms at 384.
    """
    if not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


@dataclass(frozen=True)
class StepInputs:
    """The inputs of a step of `size` rows."""

    size: int
    tokens: torch.Tensor
    positions: torch.Tensor
    drafted: DraftRows | None
    block_table: torch.Tensor
    workspace: AttentionWorkspace
    prompts: PromptRows | None = None
    """Behind the rows of the requests that `positions` has."""

    @property
    def has_requests(self) -> bool:
        """Whether there are rows for running requests."""
        return len(self.positions) > 0

    def wanted(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x [size, D] that logits are asked for: the last ones of prompts, then those of the requests."""
        if self.prompts is None:
            return x
        ends = x.index_select(0, self.prompts["ends"])
        return torch.cat((ends, x[: len(self.positions)])) if self.has_requests else ends


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
        decoded = min(max_batch * MAX_STEP_ROWS, max(MAX_DRAFTED_ROWS, max_batch)) if drafts else max_batch
        most = max(decoded, SHARED_SIZES[-1])
        self.attention_workspace = AttentionWorkspace(self.heads, max_batch, dtype, device)
        self.drafted_workspace = AttentionWorkspace(self.heads, decoded, dtype, device, drafted=True)
        # a step looks up slots for all of its rows, also for drafts past the end of the longest request
        width = -(-(max_model_len + MAX_STEP_ROWS) // cache.layout.page_size)
        self.state = RequestState.empty(max_batch, MAX_HEAD_DEPTH, device)
        self.rows = StepRows(decoded, device)
        """Of a step with drafts, see `step_drafted`."""
        self.block_table = torch.zeros(max_batch, width, dtype=torch.int32, device=device)
        self.limits = torch.zeros(max_batch, dtype=torch.int32, device=device)
        """Positions that each request has pages for: a draft head goes no further."""
        heads = self.heads.group, self.heads.head_dim
        self._prompts = PromptRows(SHARED_SIZES[-1], width, heads, cache.pages.dtype, device)
        self._shared_tokens = torch.zeros(SHARED_SIZES[-1], dtype=torch.int64, device=device)
        qkv_size = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self._squares = torch.zeros(2 * config.num_layers + 1, most, dtype=torch.int64, device=device)
        self._residual = torch.zeros(most, config.hidden_size, dtype=dtype, device=device)
        self.max_narrow = max_rows(device)
        self._qkv = torch.zeros(self.max_narrow, qkv_size, dtype=dtype, device=device)
        self._attended = torch.zeros(most, config.num_heads * config.head_dim, dtype=dtype, device=device)
        self._activated = torch.zeros(len(self._qkv), config.intermediate_size, dtype=dtype, device=device)
        self.logits = torch.zeros(
            max(decoded, MAX_PROMPTS + max_batch), config.vocab_size, dtype=torch.float32, device=device
        )
        self._sizes: dict[Kind, list[int]] = {
            "plain": batch_sizes(max_batch),
            "shared": list(SHARED_SIZES),
            "prompts": list(SHARED_SIZES),
        }
        if drafts:
            self._sizes["drafted"] = [size for size in DRAFTED_SIZES if size < decoded] + [decoded]
        self._beside = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        """For attention of prompts, while that of running requests waits for memory."""
        self.graphs = Graphs(device)
        self._feature_layers = feature_layers
        kept = most if feature_layers else 0
        self.features = torch.zeros(kept, len(feature_layers) * config.hidden_size, dtype=dtype, device=device)
        """[rows, len(feature_layers) * H]: the inputs of these layers in the last step with drafts, or pass of prompts
        alone."""

    def sizes(self, kind: Kind = "plain") -> list[int]:
        """The numbers of rows that are captured, in order."""
        return self._sizes[kind]

    def drop_size(self, size: int, kind: Kind) -> None:
        """Have steps of so many rows take the next larger graph."""
        self._sizes[kind].remove(size)
        self.graphs.drop((size, kind))

    def capture_all(self, progress: Progress, kinds: Sequence[Kind] = ("plain", "drafted", "prompts")) -> None:
        """Compile the kernels and capture every size, the largest first, whose memory the others then share.

        Steps with prompts beside them are captured when they first run.
        """
        wanted = sorted(((size, kind) for kind in kinds for size in self._sizes.get(kind, ())), reverse=True)
        for done, (size, kind) in enumerate(wanted):
            self.graphs.capture((size, kind), partial(self._work, size, kind))
            progress("capturing forward passes", (done + 1) / len(wanted))

    def step(self, rows: int) -> torch.Tensor:
        """Start the step of the first `rows` requests; returns their logits, float32 [rows, vocabulary]."""
        self._run(rows, "plain")
        return self.logits[:rows]

    def step_drafted(self, rows: int) -> torch.Tensor:
        """Start a step of `rows` rows as `self.rows.layout` has them, which must be -1 beyond; returns their logits.

        What follows from the layout is filled in `self.rows`; `accept_rows` brings `state` up to date afterwards.
        """
        self._run(rows, "drafted")
        return self.logits[:rows]

    def step_shared(
        self, rows: int, chunks: Sequence[PrefillChunk], wanted: Sequence[int], started: Started
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Start the step of the first `rows` requests and these chunks of prompts, which `can_share`.

        Returns the logits after the last tokens of the `wanted` chunks and those of the requests.
        """
        self._prompts.fill(chunks, rows, wanted, self.cache.layout.page_size)
        self._run(rows + sum(chunk.length for chunk in chunks), "shared", started)
        return self.logits[: len(wanted)], self.logits[MAX_PROMPTS : MAX_PROMPTS + rows]

    def compute_prompts(self, chunks: Sequence[PrefillChunk], wanted: Sequence[int], started: Started) -> torch.Tensor:
        """Start a pass of these chunks alone, which `can_share` with no request; returns the logits after the last
        tokens of the `wanted` ones.
        """
        self._prompts.fill(chunks, 0, wanted, self.cache.layout.page_size)
        self._run(sum(chunk.length for chunk in chunks), "prompts", started)
        return self.logits[: len(wanted)]

    def can_share(self, rows: int, chunks: Sequence[PrefillChunk]) -> bool:
        """Whether a step of so many requests can have these chunks beside it."""
        return len(chunks) <= MAX_PROMPTS and rows + sum(chunk.length for chunk in chunks) <= SHARED_SIZES[-1]

    def _run(self, rows: int, kind: Kind, started: Started | None = None) -> None:
        size = next(size for size in self._sizes[kind] if size >= rows)
        all_layers = self._config.num_layers
        ends = iter([*range(PART_LAYERS, all_layers, PART_LAYERS), all_layers] if kind == "prompts" else [all_layers])

        def part_started() -> None:
            if started is not None:
                started(next(ends))

        self.graphs.run((size, kind), partial(self._work, size, kind), part_started)

    def _work(self, size: int, kind: Kind) -> Iterator[None]:
        with _library("cublaslt") if kind in ("shared", "prompts") else nullcontext():
            yield from self._forward(size, kind)

    def inputs(self, size: int, kind: Kind) -> StepInputs:
        """Where a step of `size` rows finds them."""
        if kind == "drafted":
            rows, workspace = self.rows, self.drafted_workspace
            return StepInputs(
                size, rows.tokens[:size], rows.positions[:size], rows.drafted.up_to(size), self.block_table, workspace
            )
        tokens, positions, table = self.state.tokens, self.state.positions, self.block_table
        plain = StepInputs(size, tokens[:size], positions[:size], None, table[:size], self.attention_workspace)
        if kind == "plain":
            return plain
        with_prompts = replace(plain, tokens=self._shared_tokens[:size], prompts=self._prompts)
        if kind == "shared":
            return with_prompts
        return replace(with_prompts, positions=positions[:0], block_table=table[:0])

    def _forward(self, size: int, kind: Kind) -> Iterator[None]:
        if kind == "drafted":
            expand_rows(self.state, self.rows)
        step = self.inputs(size, kind)
        if step.prompts is not None:
            given, newest = step.prompts["tokens"][:size], self.state.tokens[: len(step.positions)]
            step.tokens.copy_(given.clamp(min=0))
            step.tokens[: len(newest)].copy_(torch.where(given[: len(newest)] < 0, newest, given[: len(newest)]))
        if step.has_requests:
            plan_decode_attention(step.positions, step.workspace, step.drafted)
        begin_decode(
            step.tokens,
            self._weights.embedding,
            self._config.embedding_scale,
            self._residual[:size],
            self._squares[:, :size],
        )
        hidden = yield from (self._forward_narrow(step) if size <= self.max_narrow else self._forward_wide(step))
        logits = self.logits[: len(hidden)]
        if len(hidden) <= self.max_narrow:
            decode_linear(hidden, self._weights.head.weight, logits, Epilogue(), self.linear_workspace)
        else:
            self._weights.head.to_float32(hidden, logits)

    def _forward_narrow(self, step: StepInputs) -> Generator[None, None, torch.Tensor]:
        """Few rows: every projection at the memory's speed, with what surrounds it. Returns the wanted rows' final
        hidden states.
        """
        size = step.size
        eps, residual, activated = self._config.norm_eps, self._residual[:size], self._activated[:size]
        qkv = self._qkv[:size]
        squares = iter(self._squares[:, :size])
        sums = next(squares)
        for index, layer in enumerate(self._weights.layers):
            keep = self._features_of(step, index)
            self._project(residual, layer.qkv, qkv, keep, squares=sums, eps=eps, bias=layer.qkv.bias)
            attended = self._attend(step, index, qkv)
            sums = next(squares)
            self._project(attended, layer.output, residual, bias=layer.output.bias, residual=True, squares_out=sums)
            activation = self._config.activation
            self._project(residual, layer.gate_up, activated, squares=sums, eps=eps, activation=activation)
            sums = next(squares)
            self._project(activated, layer.down, residual, residual=True, squares_out=sums)
            if self._ends_part(step, index):
                yield
        return rms_norm(step.wanted(residual), self._weights.norm, eps)

    def _ends_part(self, step: StepInputs, index: int) -> bool:
        """Whether a part of a pass of prompts alone is complete after this layer, and others follow."""
        done = index + 1
        return not step.has_requests and done % PART_LAYERS == 0 and done < self._config.num_layers

    def _features_of(self, step: StepInputs, index: int) -> torch.Tensor | None:
        """Where a draft head finds the input of this layer, if it wants it."""
        if index not in self._feature_layers or (step.drafted is None and step.has_requests):
            return None
        place, hidden = self._feature_layers.index(index), self._config.hidden_size
        return self.features[: step.size, place * hidden : (place + 1) * hidden]

    def _project(
        self,
        x: torch.Tensor,
        projection: Projection,
        out: torch.Tensor,
        keep: torch.Tensor | None = None,
        **epilogue: Any,
    ) -> None:
        """One projection with its surroundings, see `Epilogue`."""
        x_scale = None
        if projection.weight_scale is not None and len(x) > 1:
            if keep is not None:
                keep.copy_(x)
            x, x_scale, keep = *quantize_rows(x), None
        surroundings = Epilogue(weight_scale=projection.weight_scale, x_scale=x_scale, keep=keep, **epilogue)
        decode_linear(x, projection.weight, out, surroundings, self.linear_workspace)

    def _attend(self, step: StepInputs, index: int, qkv: torch.Tensor) -> torch.Tensor:
        layer, attended = self._weights.layers[index], self._attended[: step.size]
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        eps, pages, prompts = self._config.norm_eps, self.cache.layer(index), step.prompts
        # what follows a few rows' attention is launched before that ends, which two ways to it do not allow
        beside = self._beside if prompts is not None and step.has_requests and step.size > self.max_narrow else None
        if prompts is not None:  # first: a request may have the last token of a prompt whose others are here
            at, slots, offsets = (prompts[name][: step.size] for name in ("positions", "pages", "offsets"))
            queries = rope_cache(qkv, at, self.rope, norms, eps, pages, slots, offsets)
            if beside is not None:
                beside.wait_stream(torch.cuda.current_stream())
            with nullcontext() if beside is None else torch.cuda.stream(beside):
                attend_paged(queries, pages, prompts.plan(step.size), self.heads.head_dim**-0.5, out=attended)
        if step.has_requests:
            fused_decode_attention(
                qkv,
                pages,
                step.block_table,
                step.positions,
                self.rope,
                norms,
                eps,
                attended,
                self.heads,
                step.workspace,
                step.drafted,
                fresh=prompts is not None,
            )
        if beside is not None:
            torch.cuda.current_stream().wait_stream(beside)
        return attended

    def _forward_wide(self, step: StepInputs) -> Generator[None, None, torch.Tensor]:
        """Many rows: bound by arithmetic, so the projections are cuBLAS's. Returns the wanted rows' final hidden
        states: of the others, the last layer's K and V are all that is ever read.
        """
        size = step.size
        eps, weights, residual = self._config.norm_eps, self._weights, self._residual[:size]
        hidden = rms_norm(residual, weights.layers[0].input_norm, eps)
        for index, layer in enumerate(weights.layers):
            if (keep := self._features_of(step, index)) is not None:
                keep.copy_(residual)
            attended = self._attend(step, index, layer.qkv(hidden))
            last = index + 1 == len(weights.layers)
            if last:
                attended, residual = step.wanted(attended), step.wanted(residual)
            hidden = add_rms_norm(layer.output(attended), residual, layer.mlp_norm, eps)
            hidden = layer.down(gated_activation(layer.gate_up(hidden), self._config.activation))
            hidden = add_rms_norm(hidden, residual, weights.norm if last else weights.layers[index + 1].input_norm, eps)
            if self._ends_part(step, index):
                yield
        return hidden
