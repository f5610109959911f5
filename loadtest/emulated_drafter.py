"""A drafter for benchmarks alone: it has been told what comes, and says so with a given probability.

It shows what a trained head of known acceptance would bring on a machine, at that head's price. It says nothing about
text, and no result on text may be taken with it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from headrace.decode.drafter import Draft
from headrace.decode.sequence import Key
from headrace.engine.graph_decoder import GraphDecoder
from headrace.engine.kv_cache import CacheLayout, KVCache
from headrace.engine.model_config import ModelConfig
from headrace.engine.weights import DecoderWeights, LayerWeights
from headrace.kernels.linear import Linear

DRAFT_VOCABULARY = 32000
"""Of the published EAGLE-3 heads for Llama 3.1 (arXiv:2503.01840)."""
CONTEXT = 640
"""Tokens that each drafted one attends to."""
PAGE_SIZE = 16
TIMES = 3


class DraftWork:
    """What a head computes for a drafted token, with random weights: one decoder layer and a small vocabulary's logits.

    Its steps are on the same stream as the target's. In the target's width and dtype; not counted is what EAGLE-3 adds
    to that, an input of twice the width and a projection of three hidden states at the start of a draft.
    """

    def __init__(self, target: ModelConfig, max_batch: int, device: torch.device, dtype: torch.dtype) -> None:
        config = replace(target, num_layers=1, vocab_size=min(DRAFT_VOCABULARY, target.vocab_size))
        layout = CacheLayout(
            str(dtype).removeprefix("torch."), 1, config.num_kv_heads, config.head_dim, page_size=PAGE_SIZE
        )
        pages = CONTEXT // PAGE_SIZE
        cache = KVCache(layout, max_batch * pages, device)
        self._decoder = GraphDecoder(config, _random_weights(config, device, dtype), cache, max_batch, CONTEXT)
        table = torch.arange(max_batch * pages, dtype=torch.int32, device=device)
        self._decoder.block_table[:, :pages] = table.view(max_batch, pages)
        self._decoder.state.positions.fill_(CONTEXT - 1)

    @torch.inference_mode()
    def draft(self, requests: int, length: int) -> None:
        """Start the work of so many tokens, one after the other, of each of so many requests."""
        for _ in range(length):
            tokens = self._decoder.step(requests).argmax(-1)
            self._decoder.state.tokens[:requests] = tokens

    def seconds_a_token(self, requests: int, length: int) -> float:
        """Of drafts of so many tokens: the median of some."""
        taken = []
        for _ in range(TIMES):
            started = time.perf_counter()
            self.draft(requests, length)
            self._decoder.state.tokens.tolist()  # waits for all of it
            taken.append((time.perf_counter() - started) / length)
        return sorted(taken)[TIMES // 2]


class EmulatedDrafter:
    """A `Drafter` whose token at depth i is right with probability `rates[i]` where all before it were.

    `continuations`: by prompt, the tokens that a run without drafts gave.
    """

    name = "emulated"

    def __init__(
        self,
        continuations: Mapping[tuple[int, ...], Sequence[int]],
        rates: Sequence[float],
        work: DraftWork,
        seconds_a_token: Mapping[int, float],
    ) -> None:
        """`seconds_a_token`: of `work`, by numbers of requests, in order."""
        self._continuations = continuations
        self._rates = rates
        self._work = work
        self._seconds = seconds_a_token
        self._random = random.Random(0)
        self._known: dict[Key, tuple[Sequence[int], int]] = {}
        """What comes, and how much of it has."""

    def join(self, key: Key, token_ids: Sequence[int]) -> None:
        """See `Drafter`; the request has a prompt that was recorded, and maybe a part of its output."""
        for length in range(len(token_ids), 0, -1):
            if (coming := self._continuations.get(tuple(token_ids[:length]))) is not None:
                self._known[key] = (coming, len(token_ids) - length)
                return
        raise KeyError("this prompt was not recorded")

    def extend(self, key: Key, token_ids: Sequence[int]) -> None:
        """See `Drafter`."""
        coming, known = self._known[key]
        self._known[key] = (coming, known + len(token_ids))

    def leave(self, key: Key) -> None:
        """See `Drafter`."""
        del self._known[key]

    def costs(self, num_requests: int) -> list[float]:
        """See `Drafter`."""
        measured = next((s for requests, s in self._seconds.items() if requests >= num_requests), None)
        each = measured if measured is not None else list(self._seconds.values())[-1]
        return [each * length for length in range(len(self._rates) + 1)]

    def draft(self, limits: Mapping[Key, int]) -> dict[Key, Draft]:
        """See `Drafter`; a draft goes on after a wrong token, as a head's would."""
        self._work.draft(len(limits), max(limits.values()))
        drafts = {}
        for key, limit in limits.items():
            coming, known = self._known[key]
            tokens = [
                token if self._random.random() < rate else token ^ 1
                for token, rate in zip(coming[known : known + limit], self._rates, strict=False)
            ]
            if tokens:
                drafts[key] = Draft(tokens, range(len(tokens)))
        return drafts


def _random_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> DecoderWeights:
    def linear(out_size: int, in_size: int) -> Linear:
        return Linear(torch.empty(out_size, in_size, device=device, dtype=dtype).normal_(std=in_size**-0.5))

    hidden, heads = config.hidden_size, config.num_heads * config.head_dim
    norm = torch.ones(hidden, device=device, dtype=dtype)
    layer = LayerWeights(
        input_norm=norm,
        qkv=linear(heads + 2 * config.num_kv_heads * config.head_dim, hidden),
        q_norm=None,
        k_norm=None,
        output=linear(hidden, heads),
        mlp_norm=norm,
        gate_up=linear(2 * config.intermediate_size, hidden),
        down=linear(hidden, config.intermediate_size),
    )
    embedding = torch.empty(config.vocab_size, hidden, device=device, dtype=dtype).normal_()
    return DecoderWeights(embedding, [layer], norm, linear(config.vocab_size, hidden))
