"""Drafts of a smaller model, all on the thread that runs the engine.

It reads each token of a request, as the target does, but only when it drafts: until then tokens wait. A request of
which too many wait is drafted for no more. A prompt's keys and values were computed by the prefill worker and came with
the target's. Where some are missing, as after a move of a request whose tokens had not been read, its guesses are worse
and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from headrace.decode.chain import MAX_UNREAD, draft_chains, time_tokens, to_be_read
from headrace.decode.drafter import Draft
from headrace.decode.sequence import Key
from headrace.engine.decode_batch import DecodeBatch
from headrace.engine.engine import Engine


@dataclass
class _Unread:
    """Tokens of a request that the model has not read."""

    position: int
    """Of the first."""
    token_ids: list[int]
    is_lost: bool = False
    """There were too many."""


class ModelDrafter:
    """A `ChainDrafter` for a `DecodeBatch` of an engine with a draft model."""

    name = "model"

    def __init__(self, engine: Engine) -> None:
        assert engine.draft is not None, "the engine has no draft model"
        self._engine = engine
        self._model = engine.draft
        self._unread: dict[Key, _Unread] = {}
        self.seconds = 0.0
        """What the last `draft` took."""

    @torch.inference_mode()
    def draft(self, batch: DecodeBatch[Key], depth: int) -> dict[Key, Draft]:
        """See `ChainDrafter`. A request that is far behind gets no draft."""
        started = time.perf_counter()
        self._follow(batch)
        drafts: dict[Key, Draft] = {}
        if depth > 0:
            states, keys, positions = self._catch_up(batch)
            if keys:
                read = partial(self._read, batch)
                drafts = draft_chains(self._model, read, batch, states, keys, positions, depth)
        self.seconds = time.perf_counter() - started
        return drafts

    def _follow(self, batch: DecodeBatch[Key]) -> None:
        stays = {seen.key for seen in batch.seen}
        for key in [key for key in self._unread if key not in stays]:
            del self._unread[key]
        for seen in batch.seen:
            unread = self._unread.get(seen.key)
            if unread is None:
                unread = self._unread[seen.key] = _Unread(seen.position, [seen.token_id])
            if unread.is_lost:
                continue
            unread.token_ids += seen.token_ids
            if len(unread.token_ids) > MAX_UNREAD:
                unread.token_ids, unread.is_lost = [], True

    def _catch_up(self, batch: DecodeBatch[Key]) -> tuple[torch.Tensor, list[Key], list[int]]:
        """Read what waits, of all requests or of those least behind; returns their newest states and positions."""
        unread = {
            key: len(one.token_ids)
            for key, one in self._unread.items()
            if one.position + len(one.token_ids) <= batch.room(key)
        }
        keys = to_be_read(unread)
        if not keys:
            return torch.empty(0), [], []
        reads = [self._unread[key] for key in keys]
        starts, token_ids = [one.position for one in reads], [one.token_ids for one in reads]
        states = self._read(batch, torch.empty(0), keys, starts, token_ids)
        for one in reads:
            one.position += len(one.token_ids)
            one.token_ids = []
        ends = torch.tensor([unread[key] for key in keys]).cumsum(0) - 1
        return states[ends], keys, [one.position - 1 for one in reads]

    def _read(
        self,
        batch: DecodeBatch[Key],
        states: torch.Tensor,
        keys: Sequence[Key],
        positions: Sequence[int],
        token_ids: Sequence[Sequence[int]],
    ) -> torch.Tensor:
        return self._model.forward(batch.pack(keys, positions, token_ids, self._model.cache))

    def time_tokens(self) -> Mapping[int, float]:
        """See `ChainDrafter`."""

        def one_more(batch: DecodeBatch[int], rows: int) -> torch.Tensor:
            packed = batch.pack(range(rows), [1] * rows, [[0]] * rows, self._model.cache)
            return self._model.draft(self._model.forward(packed))[0]

        return time_tokens(self._engine, one_more)
