"""A synthetic engine: sleeps for what a step would cost and emits counted tokens. It computes nothing.

It exists for scale tests of the mesh: everything around it (queue, handoff, scheduler, publishing) is real, and so
hundreds of workers' worth of streams fit on a small machine. `--load-format synthetic` chooses it.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from headrace.engine.base import LayerAnnounced, OnLayer
from headrace.engine.batch import ForwardBatch
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk, PrefillOutput
from headrace.engine.errors import EngineError
from headrace.engine.kv_cache import CacheLayout, KVCache, PagedLayers
from headrace.engine.model_config import ModelConfig
from headrace.engine.sampler import SampledToken
from headrace.engine.step_tokens import StepTokens
from headrace.grammar import Matcher
from headrace.messages.request import SamplingParams
from headrace.messages.stream import TokenLogprobs
from headrace.scaling.step_costs import StepCosts

if TYPE_CHECKING:
    from headrace.engine.decode_batch import Verified

K = TypeVar("K", bound=Hashable)
HEAD_DIM = 8
"""Of the one layer's one head: pages are small, since nobody reads them."""


class SyntheticModel:
    """Stands where a `Model` is expected; nobody runs it."""

    follows_tables = True
    prompt_tokens: int | None = None
    cache_dtype: torch.dtype | None = None
    feature_layers: tuple[int, ...] = ()
    features = torch.empty(0, 0)

    def forward(self, batch: ForwardBatch, cache: PagedLayers, on_layer: OnLayer | None) -> torch.Tensor:
        raise EngineError("a synthetic engine has no model to run")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        raise EngineError("a synthetic engine has no model to run")

    def use_threads(self, threads: int) -> None:
        """None are used."""


class SyntheticEngine(Engine):
    """Counts: the token at output position p is `counted(p)`, whatever the prompt."""

    def __init__(self, config: EngineConfig, costs: StepCosts) -> None:
        self.costs = costs
        model_config = ModelConfig.from_folder(config.model_folder)
        layout = CacheLayout("float16", 1, 1, HEAD_DIM, config.page_size)
        cache = KVCache(layout, costs.limits.pages, torch.device("cpu"))
        longest = min(
            config.max_model_len or model_config.max_position_embeddings, costs.limits.pages * config.page_size
        )
        super().__init__(config, model_config, SyntheticModel(), cache, longest)

    def warm_up(self) -> None:
        """Nothing is compiled at first use."""

    def prepare_decode(self, progress: object, *, drafts: bool = False) -> None:
        """There is nothing to compile."""

    def prefill(self, chunks: Sequence[PrefillChunk], on_layer: LayerAnnounced | None = None) -> list[PrefillOutput]:
        """Sleep for one step with all chunks."""
        pairs = sum(chunk.length * (chunk.start + chunk.length / 2) for chunk in chunks)
        time.sleep(self.costs.prefill.seconds(sum(chunk.length for chunk in chunks), pairs))
        if on_layer is not None:
            on_layer(0, None)
        return [PrefillOutput(self.counted(c.generated, c.sampling) if c.is_last else None, []) for c in chunks]

    def counted(self, position: int, sampling: SamplingParams) -> SampledToken:
        """The token at an output position: from the second quarter of the vocabulary, where no special ones are."""
        quarter = self.model_config.vocab_size // 4
        token_id = quarter + position % quarter
        if sampling.logprobs is None:
            return SampledToken(token_id)
        return SampledToken(token_id, TokenLogprobs(token_id=token_id, logprob=0.0, top=[]))


class SyntheticBatch(Generic[K]):
    """A `RunningBatch` that keeps count of rows and of the KV tokens that a step would read."""

    lookahead = 0

    def __init__(self, engine: SyntheticEngine) -> None:
        self._engine = engine
        self._rows: dict[K, tuple[int, SamplingParams]] = {}
        """Output tokens so far, and how the next one is asked for."""
        self._contexts: dict[K, int] = {}
        self._members: tuple[K, ...] | None = None
        """The keys, until one joins or leaves."""
        self._kv_tokens = 0
        self.in_flight = 0
        self.verified: Mapping[K, Verified] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def join(
        self,
        key: K,
        token_ids: Sequence[int],
        generated: int,
        pages: Sequence[int],
        sampling: SamplingParams,
        matcher: Matcher | None = None,
    ) -> None:
        """See `RunningBatch`. Counted tokens follow no grammar."""
        self._rows[key], self._members = (generated, sampling), None
        self._contexts[key] = len(token_ids) - generated
        self._kv_tokens += len(token_ids)

    def leave(self, key: K) -> None:
        """See `RunningBatch`."""
        self._members = None
        generated, _ = self._rows.pop(key)
        self._kv_tokens -= self._contexts.pop(key) + generated

    def add_pages(self, key: K, pages: Sequence[int]) -> None:
        """Nothing is written to them."""

    def keep_pages(self, key: K, count: int) -> None:
        """Nothing was written to them."""

    def start(self, drafts: Mapping[K, Sequence[int]] = MappingProxyType({}), depth: int = 0) -> None:
        """Sleep for one step."""
        time.sleep(self._engine.costs.decode.seconds(len(self._rows), self._kv_tokens))
        self.in_flight = 1

    def collect(self) -> StepTokens[K]:
        """See `RunningBatch`."""
        self.in_flight = 0
        tokens = [self._engine.counted(generated, sampling) for generated, sampling in self._rows.values()]
        self._rows = {key: (generated + 1, sampling) for key, (generated, sampling) in self._rows.items()}
        self._kv_tokens += len(tokens)
        if self._members is None:
            self._members = tuple(self._rows)
        scores = {row: token.logprobs for row, token in enumerate(tokens) if token.logprobs is not None}
        return StepTokens(self._members, [token.token_id for token in tokens], scores)
