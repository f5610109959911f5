"""A smaller model with the target's tokenizer that guesses what the target says next.

Its keys and values lie in further layers of the target's cache, behind the target's own, so that they are handed over
as those are: a page of such a layer holds a page of as many of the draft model's layers as fit, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from headrace.engine.base import Model
from headrace.engine.batch import ForwardBatch
from headrace.engine.errors import EngineError
from headrace.engine.kv_cache import CacheLayout, KVCache
from headrace.engine.model_config import ModelConfig


def draft_layout(config: ModelConfig, target: CacheLayout) -> CacheLayout:
    """The shape of a draft model's part of a cache. Raises `EngineError` where its layers don't fit into pages."""
    layout = replace(target, num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)
    rows = 2 * target.num_kv_heads * target.head_dim
    if layout.page_bytes > target.page_bytes or rows % config.head_dim:
        raise EngineError(
            f"--draft-model: its {config.num_kv_heads} KV heads of {config.head_dim} numbers do not fit where the "
            f"model's {target.num_kv_heads} of {target.head_dim} do: give a smaller draft model"
        )
    return layout


def layers_taken(layout: CacheLayout, target: CacheLayout) -> int:
    """Layers of the target's cache that hold a draft model's."""
    return -(-layout.num_layers // (target.page_bytes // layout.page_bytes))


class DraftCache:
    """The draft model's part of a cache, see `PagedLayers`: the last `layers_taken` of the cache's layers."""

    def __init__(self, layout: CacheLayout, cache: KVCache) -> None:
        self.layout = layout
        self.num_pages = cache.num_pages
        together = cache.layout.page_bytes // layout.page_bytes
        first = cache.layout.num_layers - layers_taken(layout, cache.layout)
        shape = (cache.num_pages, 2, layout.num_kv_heads, layout.page_size, layout.head_dim)
        numbers = 2 * layout.num_kv_heads * layout.page_size * layout.head_dim
        self._layers: list[torch.Tensor] = []
        for index in range(layout.num_layers):
            whole = cache.layer(first + index // together).view(cache.num_pages, -1)
            at = index % together * numbers
            self._layers.append(whole[:, at : at + numbers].view(shape))

    def layer(self, index: int) -> torch.Tensor:
        """See `PagedLayers`."""
        return self._layers[index]


@dataclass(frozen=True)
class DraftModel:
    """Belongs on the engine's thread."""

    config: ModelConfig
    model: Model
    cache: DraftCache
    vocabulary: int
    """Tokens below this are in both models' vocabularies; padding may make them differ behind it."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Final hidden states [T, H] of a batch whose plan is for `cache`; writes K and V there."""
        known = batch.token_ids.clamp(max=self.config.vocab_size - 1)
        return self.model.forward(replace(batch, token_ids=known), self.cache, None)

    def draft(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest token after each state, int64 [T], and its probability, float32 [T]."""
        probabilities, tokens = self.model.logits(states)[:, : self.vocabulary].softmax(-1).max(-1)
        return tokens, probabilities
