"""A draft head of 4-bit weights on a CPU: the compiled decoder of `packed_decoder`, with one layer that reads pairs."""

from __future__ import annotations

import numpy as np
import torch

from headrace.engine.batch import ForwardBatch
from headrace.engine.draft_head import HeadWeights
from headrace.engine.errors import EngineError
from headrace.engine.kv_cache import KVCache
from headrace.engine.model_config import ModelConfig
from headrace.engine.packed_decoder import Team, grown, in_turn, kernel_shape, kernel_weights
from headrace.kernels import packed_decoder as kernels
from headrace.kernels.packed_linear import aligned, pack
from headrace.kernels.packed_state import Shape, Weights
from headrace.kernels.paged_attention import PagedPlan
from headrace.kernels.round_weights import round_to_4_bits

LAST_NORM = kernels.PHASES_OF_LAYER + kernels.LAST_NORM
END = kernels.PHASES_OF_LAYER + kernels.HEAD + 1
GUESSED_AT_ONCE = 4
"""Up to so many rows `forward` computes what `draft` is asked for next: to wake threads for that costs more than rows
that nobody asks for."""


FREQUENT = 8192
"""Tokens that are drafted of a vocabulary by frequency: twice as many are right 0.025 more often in open chat, and take
0.13 ms more of 5.6."""


class PackedHead:
    """See `DraftHead`; beside a `PackedDecoder`, of whose batches its plans are."""

    def __init__(self, config: ModelConfig, weights: HeadWeights, embedding: torch.Tensor, max_model_len: int) -> None:
        """Raises `EngineError` where the head's sizes do not fit the kernels."""
        self.feature_layers = weights.feature_layers
        self._config = config
        self._embedding = embedding
        drafted = FREQUENT if weights.by_frequency else len(weights.rows)
        self._vocabulary = weights.vocabulary[:drafted].numpy()
        self._longest = max_model_len
        self._norms = {
            name: value.float().numpy()
            for name, value in (
                ("input_norms", torch.cat((weights.input_norm, weights.hidden_norm))),
                ("mlp_norms", weights.mlp_norm),
                ("norm", weights.norm),
            )
        }
        gate_up = torch.from_numpy(in_turn(*weights.gate_up.numpy().reshape(2, -1, config.hidden_size)))
        self._records = {
            "fc": _packed(weights.fc),
            "qkv": _packed(weights.qkv),
            "output": _packed(weights.output),
            "gate_up": _packed(gate_up),
            "down": _packed(weights.down),
            "head": _packed(weights.rows[:drafted]),
        }
        self._frequencies = config.rope.inverse_frequencies().numpy()
        self._cache: KVCache | None = None
        self._threads = 1
        self._team: Team | None = None
        self._rows_with_logits = 0
        """Of the last `forward`, whose states are still there."""

    def use_threads(self, threads: int) -> None:
        """How many may work from now on, the caller's included."""
        self._threads = threads

    def attach(self, cache: KVCache) -> None:
        """See `DraftHead`."""
        self._cache = cache

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """See `DraftHead`."""
        rows = len(features)
        team = self._team_for(rows)
        self._rows_with_logits = 0
        team.features[:rows] = features
        team.fuse(rows, self._records["fc"])
        return team.residual[:rows]

    def forward(self, states: torch.Tensor, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """See `DraftHead`."""
        rows, at_once = len(states), len(states) <= GUESSED_AT_ONCE
        team = self._run(states, batch, cache, END if at_once else LAST_NORM)
        self._rows_with_logits = rows if at_once else 0
        return team.residual[:rows]

    def write(self, states: torch.Tensor, batch: ForwardBatch, cache: KVCache) -> None:
        """See `DraftHead`."""
        self._run(states, batch, cache, kernels.ROPE + 1)

    def _run(self, states: torch.Tensor, batch: ForwardBatch, cache: KVCache, end: int) -> Team:
        """Run the layer's phases up to `end`."""
        plan, rows = batch.plan, len(batch.token_ids)
        assert isinstance(plan, PagedPlan)
        assert cache is self._cache, "it is attached to another cache"
        team = self._holding(states)
        requests, width = plan.block_table.shape
        team.embedded.numpy()[:rows] = self._embedding.numpy()[batch.token_ids.numpy()]
        team.inputs.positions[:rows] = batch.positions.numpy()
        team.inputs.request[:rows] = plan.request
        team.tables[:requests, :width] = plan.block_table.numpy()
        team.control[kernels.ROWS] = team.control[kernels.OUTPUT_ROWS] = rows
        team.run(0, end, self._threads)
        return team

    def draft(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DraftHead`."""
        first, rows = self._row_with_logits(states), len(states)
        if first is None:
            first, team = 0, self._holding(states)
            team.control[kernels.ROWS] = team.control[kernels.OUTPUT_ROWS] = rows
            team.run(LAST_NORM, END, self._threads)
        found, chances = self._team_for(rows).likeliest(first, rows)
        return torch.from_numpy(self._vocabulary[found]), torch.from_numpy(chances)

    def _row_with_logits(self, states: torch.Tensor) -> int | None:
        """Where these states begin in the last `forward`'s, if they are some of those and have logits."""
        if self._team is None or not self._rows_with_logits:
            return None
        first, apart = divmod(states.data_ptr() - self._team.residual.data_ptr(), 4 * self._config.hidden_size)
        return first if apart == 0 and 0 <= first <= self._rows_with_logits - len(states) else None

    def _holding(self, states: torch.Tensor) -> Team:
        """The team, with these states in its rows."""
        team = self._team_for(len(states))
        self._rows_with_logits = 0
        if states.data_ptr() != team.residual.data_ptr():
            team.residual[: len(states)] = states
        return team

    def _team_for(self, rows: int) -> Team:
        self._team = grown(self._team, rows, self._kernel_arguments)
        return self._team

    def _kernel_arguments(self) -> tuple[Weights, Shape]:
        assert self._cache is not None, "attach comes first"
        layers = [self._cache.layer(self._config.num_layers)]
        return kernel_weights(self._records, self._norms, self._frequencies, layers), self._shape(self._cache)

    def _shape(self, cache: KVCache) -> Shape:
        config = self._config
        return kernel_shape(
            config,
            cache,
            self._longest,
            layers=1,
            vocabulary=len(self._vocabulary),
            head_copies=1,
            qkv_inputs=2 * config.hidden_size,
            num_features=len(self.feature_layers) * config.hidden_size,
            feature_layers=(-1, -1, -1),
        )


def _packed(weight: torch.Tensor) -> np.ndarray:
    packed = pack(round_to_4_bits(weight).numpy())
    if packed is None or packed.copies != 1:
        raise EngineError(f"a draft head's weight of {tuple(weight.shape)} can't be packed: give --quantization none")
    return aligned(packed.records).reshape(-1)
