"""Drafts of a head over the target's hidden states, all on the thread that runs the engine.

After each step a request has states for the positions that the step has settled. The head reads them when it drafts,
which is not each time: until then they wait. A request of which too many wait is drafted for no more.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from headrace.decode.chain import MAX_UNREAD, draft_chains, time_tokens, to_be_read
from headrace.decode.drafter import Draft
from headrace.decode.sequence import Key
from headrace.engine.decode_batch import DecodeBatch
from headrace.engine.draft_head import DraftHead
from headrace.engine.engine import Engine


@dataclass
class _Waiting:
    """What a request's head has not read."""

    position: int
    """Of the first."""
    features: list[torch.Tensor] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    """Those after each position."""
    is_lost: bool = False
    """Too much waited."""


class HeadDrafter:
    """A `ChainDrafter` for a `DecodeBatch` of an engine with a head."""

    name = "head"

    def __init__(self, engine: Engine) -> None:
        assert engine.head is not None, "the engine has no head"
        self._engine = engine
        self._head: DraftHead = engine.head
        self._waiting: dict[Key, _Waiting] = {}
        self.seconds = 0.0
        """What the last `draft` took."""

    @torch.inference_mode()
    def draft(self, batch: DecodeBatch[Key], depth: int) -> dict[Key, Draft]:
        """Up to `depth` tokens for each request of the step that has just ended. To be called after each step."""
        started = time.perf_counter()
        self._follow(batch)
        drafts: dict[Key, Draft] = {}
        if depth > 0:
            states, keys, positions = self._read(batch)
            if keys:
                read = partial(self._forward, batch)
                drafts = draft_chains(self._head, read, batch, states, keys, positions, depth)
        self.seconds = time.perf_counter() - started
        return drafts

    def _follow(self, batch: DecodeBatch[Key]) -> None:
        features, stays = self._engine.model.features, {seen.key for seen in batch.seen}
        for key in [key for key in self._waiting if key not in stays]:
            del self._waiting[key]
        for seen in batch.seen:
            waiting = self._waiting.get(seen.key)
            if waiting is None:
                waiting = self._waiting[seen.key] = _Waiting(seen.position)
            if waiting.is_lost:
                continue
            assert waiting.position + len(waiting.token_ids) == seen.position, "a step was missed"
            waiting.features.append(features[seen.first_row : seen.first_row + len(seen.token_ids)].clone())
            waiting.token_ids += seen.token_ids
            if len(waiting.token_ids) > MAX_UNREAD:
                waiting.features, waiting.token_ids, waiting.is_lost = [], [], True

    def _read(self, batch: DecodeBatch[Key]) -> tuple[torch.Tensor, list[Key], list[int]]:
        """Read what waits, of all requests or of those least behind; returns their newest states and positions."""
        chosen = to_be_read({key: len(one.token_ids) for key, one in self._waiting.items()})
        read = {key: self._waiting[key] for key in chosen}
        if not read:
            return torch.empty(0), [], []
        counts = [len(one.token_ids) for one in read.values()]
        fused = self._head.fuse(torch.cat([part for one in read.values() for part in one.features]))
        starts, token_ids = [one.position for one in read.values()], [one.token_ids for one in read.values()]
        states = self._forward(batch, fused, list(read), starts, token_ids)
        last = torch.tensor(counts).cumsum(0) - 1
        for one in read.values():
            one.position += len(one.token_ids)
            one.features, one.token_ids = [], []
        return states[last.to(states.device)], list(read), [one.position - 1 for one in read.values()]

    def _forward(
        self,
        batch: DecodeBatch[Key],
        states: torch.Tensor,
        keys: Sequence[Key],
        positions: Sequence[int],
        token_ids: Sequence[Sequence[int]],
    ) -> torch.Tensor:
        return self._head.forward(states, batch.pack(keys, positions, token_ids), self._engine.cache)

    def time_tokens(self) -> Mapping[int, float]:
        """See `ChainDrafter`."""
        engine, head = self._engine, self._head

        def one_more(batch: DecodeBatch[int], rows: int) -> torch.Tensor:
            packed = batch.pack(range(rows), [1] * rows, [[0]] * rows)
            states = torch.zeros(rows, engine.model_config.hidden_size, dtype=engine.model.features.dtype)
            return head.draft(head.forward(states.to(engine.device), packed, engine.cache))[0]

        return time_tokens(engine, one_more)
