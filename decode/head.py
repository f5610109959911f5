"""Drafts of a head over the target's hidden states, all on the thread that runs the engine.

After each step a request has states for the positions that the step has settled. The head reads them when it drafts,
which is not each time: until then they wait. What it then guesses is read by itself, one token after the other, into
slots of the request's pages that the next reading overwrites: so refused tokens leave nothing to roll back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from headrace.decode.drafter import Draft
from headrace.decode.sequence import Key
from headrace.engine.decode_batch import DecodeBatch
from headrace.engine.draft_head import DraftHead
from headrace.engine.engine import Engine

MAX_WAITING = 64
"""Positions that wait to be read, of all requests: then they are read in any case."""
DOUBTFUL = 0.2
"""A draft whose tokens are all right with so little probability, as the head sees it, does not get longer."""
STEPS_APART, CONFIDENCES = 4, 8
"""Acceptance is estimated by so many places in a draft, the last for all that follow, and as many steps of
probability."""
TIMED_ROWS = (1, 4, 16)
TIMED_STEPS = 5


@dataclass
class _Waiting:
    """What a request's head has not read."""

    position: int
    """Of the first."""
    features: list[torch.Tensor] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    """Those after each position."""


class HeadDrafter:
    """Drafts for a `DecodeBatch` of an engine with a head."""

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
        if depth > 0 or sum(len(one.token_ids) for one in self._waiting.values()) >= MAX_WAITING:
            states, keys, positions = self._read(batch)
            if depth > 0 and keys:
                drafts = self._go_on(batch, states, keys, positions, depth)
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
            assert waiting.position + len(waiting.token_ids) == seen.position, "a step was missed"
            waiting.features.append(features[seen.first_row : seen.first_row + len(seen.token_ids)].clone())
            waiting.token_ids += seen.token_ids

    def _read(self, batch: DecodeBatch[Key]) -> tuple[torch.Tensor, list[Key], list[int]]:
        """Read all that waits; returns each request's newest state and its position."""
        read = {key: one for key, one in self._waiting.items() if one.token_ids}
        if not read:
            return torch.empty(0), [], []
        counts = [len(one.token_ids) for one in read.values()]
        packed = batch.pack(
            list(read), [one.position for one in read.values()], [one.token_ids for one in read.values()]
        )
        features = torch.cat([part for one in read.values() for part in one.features])
        states = self._head.forward(self._head.fuse(features), packed, self._engine.cache)
        last = torch.tensor(counts).cumsum(0) - 1
        for one in read.values():
            one.position += len(one.token_ids)
            one.features, one.token_ids = [], []
        return states[last.to(states.device)], list(read), [one.position - 1 for one in read.values()]

    def _go_on(
        self, batch: DecodeBatch[Key], states: torch.Tensor, keys: Sequence[Key], positions: Sequence[int], depth: int
    ) -> dict[Key, Draft]:
        """Draft from these states; a request whose pages are full, or whose draft has become doubtful, stops there."""
        drafted: dict[Key, tuple[list[int], list[int]]] = {key: ([], []) for key in keys}
        going, at, chances = list(keys), list(positions), [1.0] * len(keys)
        for step in range(depth):
            tokens, sure = (column.tolist() for column in self._head.draft(states))
            for key, token, one in zip(going, tokens, sure, strict=True):
                drafted[key][0].append(token)
                drafted[key][1].append(confidence_depth(step, one))
            if step + 1 == depth:
                break
            chances = [chance * one for chance, one in zip(chances, sure, strict=True)]
            goes_on = [
                row for row, key in enumerate(going) if at[row] + 1 < batch.room(key) and chances[row] >= DOUBTFUL
            ]
            if len(goes_on) < len(going):
                if not goes_on:
                    break
                states, going, at = states[goes_on], [going[row] for row in goes_on], [at[row] for row in goes_on]
                tokens, chances = [tokens[row] for row in goes_on], [chances[row] for row in goes_on]
            at = [position + 1 for position in at]
            packed = batch.pack(going, at, [[token] for token in tokens])
            states = self._head.forward(states, packed, self._engine.cache)
        return {key: Draft(*columns) for key, columns in drafted.items()}


def confidence_depth(step: int, probability: float) -> int:
    """A drafted token's depth: how far into the draft it is, and how sure the head is of it."""
    return min(step, STEPS_APART - 1) * CONFIDENCES + min(int(probability * CONFIDENCES), CONFIDENCES - 1)


@torch.inference_mode()
def time_head(engine: Engine) -> dict[int, float]:
    """Seconds that one more token costs, by the number of requests it is drafted for: the fastest of several."""
    from headrace.messages.request import SamplingParams

    head, batch = engine.head, DecodeBatch[int](engine)
    assert head is not None
    fastest: dict[int, float] = {}
    pages = engine.pool.allocate(1)
    for rows in TIMED_ROWS:
        if rows > engine.config.max_num_seqs:
            break
        while len(batch) < rows:
            batch.join(len(batch), [0, 0], 1, pages, SamplingParams(max_tokens=2))
        states = torch.zeros(rows, engine.model_config.hidden_size, dtype=engine.model.features.dtype)
        for _ in range(TIMED_STEPS):
            started = time.perf_counter()
            packed = batch.pack(range(rows), [1] * rows, [[0]] * rows)
            tokens, _ = head.draft(head.forward(states.to(engine.device), packed, engine.cache))
            tokens.tolist()  # waits for it
            seconds = time.perf_counter() - started
            fastest[rows] = min(fastest.get(rows, seconds), seconds)
    engine.pool.release(pages)
    return fastest
