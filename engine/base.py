"""The one interface of all ways to run a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from headrace.engine.batch import ForwardBatch
from headrace.engine.kv_cache import PagedLayers

OnLayer = Callable[[int], None]


class Ready(Protocol):
    """Device work that may still run; a `torch.cuda.Event` is one."""

    def synchronize(self) -> None:
        """Wait for it."""

    def query(self) -> bool:
        """Whether it is over."""


LayerAnnounced = Callable[[int, Ready | None], None]
"""A layer's K and V are in the cache as soon as the device work is over (None: already)."""


class Model(Protocol):
    """A decoder with its weights on one device."""

    prompt_tokens: int | None
    """Prompt tokens of a step from which on a token costs the same, where the model knows better than its device."""
    follows_tables: bool
    """Its plans are `PagedPlan`s."""
    cache_dtype: torch.dtype | None
    """What it stores K and V in, where that is not the type of its activations."""

    feature_layers: tuple[int, ...]
    """Layers whose inputs, the residual stream, are kept as `features`, in ascending order."""
    features: torch.Tensor
    """[T, len(feature_layers) * H] of the last forward; the next one may overwrite it."""

    def forward(self, batch: ForwardBatch, cache: PagedLayers, on_layer: OnLayer | None) -> torch.Tensor:
        """Compute the batch and return the final, normalised hidden states of the wanted rows [R, H].

        `on_layer(l)` is called as soon as the K and V of layer l are in the cache.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, H] to float32 [R, vocabulary]."""

    def use_threads(self, threads: int) -> None:
        """How many cores a forward may use from now on."""
