"""Runs a decoder of Llama's shape with packed weights on a CPU: no operation of torch's in a layer, no OpenMP pool."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from headrace.engine.base import OnLayer
from headrace.engine.batch import ForwardBatch
from headrace.engine.kv_cache import PagedLayers
from headrace.engine.model_config import ModelConfig
from headrace.engine.weights import Checkpoint, Progress
from headrace.kernels import packed_decoder as kernels
from headrace.kernels.packed_attention import AT_ONCE
from headrace.kernels.packed_linear import BLOCK, INPUT, PackedWeight, aligned, pack
from headrace.kernels.packed_state import Buffers, Inputs, Shape, Weights
from headrace.kernels.paged_attention import PagedPlan
from headrace.kernels.round_weights import round_to_4_bits
from headrace.kernels.simd import LANES

LAYERS_AT_ONCE = 10
"""Layers between two calls of `on_layer`: for each, the thread must wait for the interpreter's lock."""
FIRST_ROWS = 16
"""Rows that buffers are made for at first; they double when a batch has more."""


class PackedWeights(NamedTuple):
    """A model's records and norms, numpy arrays, and the embedding, a tensor [vocabulary, hidden]."""

    embedding: torch.Tensor
    records: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]
    head_copies: int


def load_packed(folder: Path, config: ModelConfig, progress: Progress, *, rounds: bool = False) -> PackedWeights | None:
    """Pack a checkpoint's weights without loss; None where they are not of so few bits, or the model is not as simple.

    With `rounds` those of more bits are rounded to 4.

    Raises `EngineError` where a weight is missing.
    """
    plain = config.activation == "silu" and config.embedding_scale == 1.0 and not config.norm_plus_one
    if not plain or config.head_dim % BLOCK or config.rope.rotary_dim != config.head_dim:
        return None
    checkpoint = Checkpoint(folder, torch.device("cpu"), torch.float32)
    try:
        return _pack_all(checkpoint, config, progress, rounds)
    finally:
        checkpoint.close()


def _pack_all(checkpoint: Checkpoint, config: ModelConfig, progress: Progress, rounds: bool) -> PackedWeights | None:
    def packed_form(weight: torch.Tensor, most_copies: int) -> PackedWeight | None:
        packed = pack(weight.numpy())
        fits = packed is not None and packed.copies <= most_copies
        return packed if fits or not rounds else pack(round_to_4_bits(weight).numpy())

    records: dict[str, list[np.ndarray]] = {"qkv": [], "output": [], "gate_up": [], "down": []}
    norms: dict[str, list[np.ndarray]] = {"input_norms": [], "mlp_norms": []}
    for index in range(config.num_layers):
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        if any(name in checkpoint for name in (attention + "q_norm.weight", attention + "q_proj.bias")):
            return None
        if attention + "q_proj.weight" not in checkpoint:  # packed by whoever saved it, as Phi-3
            return None
        gate, up = (checkpoint.get(f"{mlp}{part}_proj.weight").numpy() for part in ("gate", "up"))
        if len(gate) % BLOCK:
            return None
        weights = {
            "qkv": checkpoint.stacked(*[f"{attention}{part}_proj.weight" for part in "qkv"]),
            "output": checkpoint.get(attention + "o_proj.weight"),
            "gate_up": torch.from_numpy(in_turn(gate, up)),
            "down": checkpoint.get(mlp + "down_proj.weight"),
        }
        for name, weight in weights.items():
            packed = packed_form(weight, 1)
            if packed is None or packed.copies != 1:
                return None
            records[name].append(packed.records)
        for name, source in (("input_norms", "input_layernorm"), ("mlp_norms", "post_attention_layernorm")):
            norms[name].append(checkpoint.get(f"model.layers.{index}.{source}.weight").numpy())
        progress("packing weights", (index + 1) / config.num_layers)
    embedding = checkpoint.get("model.embed_tokens.weight")
    tied = config.tied_head or "lm_head.weight" not in checkpoint
    head = packed_form(embedding if tied else checkpoint.get("lm_head.weight"), 2)
    if head is None:
        return None
    flat = {name: aligned(np.stack(parts)).reshape(-1) for name, parts in records.items()}
    flat["head"] = head.records.reshape(-1)
    norm = {name: np.concatenate(parts) for name, parts in norms.items()}
    norm["norm"] = checkpoint.get("model.norm.weight").numpy()
    return PackedWeights(embedding, flat, norm, head.copies)


def in_turn(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Rows of both [inner, hidden] as the kernels want them: a block of the gate, then the same of up."""
    blocks = [part.reshape(-1, BLOCK, part.shape[1]) for part in (gate, up)]
    return np.stack(blocks, axis=1).reshape(-1, gate.shape[1])


def kernel_weights(
    records: Mapping[str, np.ndarray],
    norms: Mapping[str, np.ndarray],
    frequencies: np.ndarray,
    layers: Sequence[torch.Tensor],
) -> Weights:
    """What the kernels read, by the names that models and draft heads share; `layers`: the pages of each, float16."""
    memory = torch.empty(0, dtype=torch.int16).set_(layers[0].untyped_storage())
    return Weights(
        input_norms=norms["input_norms"],
        qkv=records["qkv"],
        output=records["output"],
        mlp_norms=norms["mlp_norms"],
        gate_up=records["gate_up"],
        down=records["down"],
        norm=norms["norm"],
        head=records["head"],
        inverse_frequencies=frequencies,
        pages=memory.numpy(),
        pages_at=np.array([pages.storage_offset() for pages in layers]),
    )


def kernel_shape(config: ModelConfig, cache: PagedLayers, longest: int, **own: Any) -> Shape:
    """Sizes for requests of `longest` tokens; `own`: the fields of `Shape` that config and cache leave open."""
    page_size = cache.layout.page_size
    table_width = -(-longest // page_size) + 1
    return Shape(
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_stride=cache.layer(0).stride(0),
        page_size=page_size,
        table_width=table_width,
        longest=-(-(table_width * page_size + AT_ONCE - 1) // LANES) * LANES,
        eps=config.norm_eps,
        **own,
    )


class PackedDecoder:
    """See `Model`. Its batches' plans are `PagedPlan`s."""

    follows_tables = True
    prompt_tokens: int | None = 96
    cache_dtype: torch.dtype | None = torch.float16

    def __init__(self, config: ModelConfig, weights: PackedWeights, max_model_len: int) -> None:
        self._config = config
        self._weights = weights
        self._longest = max_model_len
        self.feature_layers: tuple[int, ...] = ()
        self.features = torch.empty(0, 0)
        self._frequencies = config.rope.inverse_frequencies().numpy()
        self._cache: PagedLayers | None = None
        self._threads = 1
        self._team: Team | None = None
        self._has_logits = False
        """Of all rows of the last `forward`."""

    @property
    def embedding(self) -> torch.Tensor:
        """[vocabulary, hidden] float32."""
        return self._weights.embedding

    def use_threads(self, threads: int) -> None:
        """How many may work from now on, the caller's included."""
        self._threads = threads
        torch.set_num_threads(1)  # what is left to torch is small, and its pool would spin on the team's cores

    def forward(self, batch: ForwardBatch, cache: PagedLayers, on_layer: OnLayer | None) -> torch.Tensor:
        """See `Model.forward`. The result is overwritten by the next call."""
        plan, rows = batch.plan, len(batch.token_ids)
        assert isinstance(plan, PagedPlan)
        team = self._team_for(rows, cache)
        requests, width = plan.block_table.shape
        team.residual.numpy()[:rows] = self._weights.embedding.numpy()[batch.token_ids.numpy()]
        team.inputs.positions[:rows] = batch.positions.numpy()
        team.inputs.request[:rows] = plan.request
        team.tables[:requests, :width] = plan.block_table.numpy()
        team.control[kernels.ROWS] = rows
        layers, phases = self._config.num_layers, kernels.PHASES_OF_LAYER
        last_phase = kernels.LAST_NORM
        if batch.wants_logits:
            team.control[kernels.OUTPUT_ROWS], last_phase = rows, kernels.HEAD
        self._has_logits = batch.wants_logits
        end = layers * phases + last_phase + 1
        if on_layer is None:
            team.run(0, end, self._threads)
        else:
            done = 0
            for first in range(0, layers, LAYERS_AT_ONCE):
                last = min(first + LAYERS_AT_ONCE, layers) - 1
                written = last * phases + kernels.ROPE + 1
                team.run(done, written, self._threads)
                done = written
                for layer in range(first, last + 1):
                    on_layer(layer)
            team.run(done, end, self._threads)
        self.features = team.features[:rows]
        return team.hidden[:rows] if batch.wanted is None else team.hidden.index_select(0, batch.wanted)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Model.logits`. The result is overwritten by the next call."""
        assert self._team is not None, "logits follow a forward"
        team, rows = self._team, len(hidden)
        if hidden.data_ptr() != team.hidden.data_ptr():
            team.hidden[:rows] = hidden
        elif self._has_logits:
            return team.logits[:rows]
        team.control[kernels.OUTPUT_ROWS] = rows
        first = self._config.num_layers * kernels.PHASES_OF_LAYER + kernels.HEAD_INPUT
        team.run(first, first + 2, self._threads)
        return team.logits[:rows]

    def _team_for(self, rows: int, cache: PagedLayers) -> Team:
        if cache is not self._cache:
            self._cache, self._team = cache, None
        self._team = grown(self._team, rows, self._kernel_arguments)
        return self._team

    def _kernel_arguments(self) -> tuple[Weights, Shape]:
        assert self._cache is not None
        layers = [self._cache.layer(index) for index in range(self._config.num_layers)]
        weights = kernel_weights(self._weights.records, self._weights.norms, self._frequencies, layers)
        return weights, self._shape(self._cache)

    def _shape(self, cache: PagedLayers) -> Shape:
        config = self._config
        return kernel_shape(
            config,
            cache,
            self._longest,
            layers=config.num_layers,
            vocabulary=config.vocab_size,
            head_copies=self._weights.head_copies,
            qkv_inputs=config.hidden_size,
            num_features=len(self.feature_layers) * config.hidden_size,
            feature_layers=self._kept_layers(),
        )

    def _kept_layers(self) -> tuple[int, int, int]:
        if not self.feature_layers:
            return (-1, -1, -1)
        low, middle, high = self.feature_layers
        return (low, middle, high)


class Team:
    """Buffers for up to `rows` rows, and threads that sleep until there is work. They end with this object."""

    def __init__(self, weights: Weights, shape: Shape, rows: int, threads: int) -> None:
        self.rows = rows
        self.control = np.zeros(kernels.CONTROL_SIZE, np.int64)
        self.control[kernels.TICKET] = kernels.NO_PHASE << 16
        self.inputs = Inputs(
            np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.zeros(rows * shape.table_width, np.int64)
        )
        self.tables = self.inputs.tables.reshape(rows, -1)
        buffers = _buffers(shape, rows, threads)
        self.residual, self.hidden, self.features, self.embedded = (
            torch.from_numpy(buffer.reshape(rows, len(buffer) // rows))
            for buffer in (buffers.residual, buffers.hidden, buffers.features, buffers.embedded)
        )
        self.logits = torch.from_numpy(buffers.logits.reshape(rows, -1))
        self._shape, self._buffers = shape, buffers
        self._semaphore = np.zeros(8, np.int64)  # sem_t: 32 bytes on 64-bit Linux
        ctypes.CDLL(None).sem_init(ctypes.c_void_p(self._semaphore.ctypes.data), 0, 0)
        self._arguments = (self._semaphore.ctypes.data, self.control, weights, shape, self.inputs, buffers)
        self._threads = [
            threading.Thread(target=kernels.take_part, args=(number, 0, *self._arguments), name="team", daemon=True)
            for number in range(1, threads)
        ]
        for thread in self._threads:
            thread.start()
        weakref.finalize(self, _stop, self.control, self._semaphore, self._threads)

    def fuse(self, rows: int, records: np.ndarray) -> None:
        """See `kernels.packed_decoder.fuse`."""
        kernels.fuse(rows, records, self._shape, self._buffers)

    def likeliest(self, first: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Of so many rows of logits: the likeliest outputs, int64, and their probabilities, float32."""
        found, chances = np.empty(rows, np.int64), np.empty(rows, np.float32)
        kernels.likeliest(first, rows, self._shape, self._buffers, found, chances)
        return found, chances

    def run(self, first_phase: int, end_phase: int, threads: int) -> None:
        """Run phases `first_phase` to `end_phase` on this thread and up to `threads` - 1 others."""
        helpers = min(threads - 1, len(self._threads))
        kernels.open_phases(self.control, first_phase, end_phase)
        kernels.take_part(0, helpers, *self._arguments)


def grown(team: Team | None, rows: int, arguments: Callable[[], tuple[Weights, Shape]]) -> Team:
    """The team, or where it has too few rows, or there is none, a new one."""
    if team is not None and rows <= team.rows:
        return team
    return Team(*arguments(), max(FIRST_ROWS, 1 << (rows - 1).bit_length()), len(os.sched_getaffinity(0)))


def _stop(control: np.ndarray, semaphore: np.ndarray, threads: list[threading.Thread]) -> None:
    control[kernels.STOP] = 1
    for _ in threads:
        ctypes.CDLL(None).sem_post(ctypes.c_void_p(semaphore.ctypes.data))


def _buffers(shape: Shape, rows: int, threads: int) -> Buffers:
    def floats(*size: int) -> np.ndarray:
        return aligned(np.zeros(size, np.float32)).reshape(-1)

    attended = shape.heads * shape.head_dim
    wide = max(shape.hidden * shape.head_copies, shape.qkv_inputs, shape.num_features)
    inner = max(shape.inner, attended)
    group = shape.heads // shape.kv_heads
    return Buffers(
        residual=floats(rows, shape.hidden),
        cosines=floats(rows, shape.head_dim // 2),
        sines=floats(rows, shape.head_dim // 2),
        hidden=floats(rows, shape.hidden),
        qkv=floats(rows, attended + 2 * shape.kv_heads * shape.head_dim),
        attended=floats(rows, attended),
        gate_up=floats(threads, rows, 2 * BLOCK),
        logits=floats(rows, shape.vocabulary),
        inputs=floats(rows, wide // BLOCK, INPUT),
        inner_inputs=floats(rows, inner // BLOCK, INPUT),
        shares=floats(threads, group),
        scores=floats(threads, group, shape.longest),
        features=floats(rows, shape.num_features),
        embedded=floats(rows, shape.hidden if shape.qkv_inputs > shape.hidden else 0),
    )
