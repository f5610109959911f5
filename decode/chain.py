"""Drafts that a head or a draft model makes, token after token, on the thread that runs the engine.

It reads what a step has settled only when it drafts, which is not each time: until then that waits. A request of which
too much waits is drafted for no more.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from headrace.decode.drafter import Draft
from headrace.decode.sequence import Key
from headrace.engine.batch import ForwardBatch
from headrace.engine.decode_batch import DecodeBatch, Seen
from headrace.engine.engine import Engine
from headrace.engine.kv_cache import PagedLayers
from headrace.messages.request import SamplingParams

DOUBTFUL = 0.45
"""A draft whose tokens are all right with so little probability, as its drafter sees it, does not get longer. What a
further token costs is a third of what it brings, and those are right more often than their drafter believes."""
UP_TO_DATE = 8
"""A request with no more tokens to read is read whenever drafts are made."""
MAX_UNREAD = 64
"""Of all others, those that are least behind first, so many tokens are read at a time, and a request with more is
drafted for no more. To read all that a full batch says would take 4 % of its steps, in which drafts hardly ever pay."""
STEPS_APART, CONFIDENCES = 4, 8
"""Acceptance is estimated by so many places in a draft, the last for all that follow, and as many steps of
probability."""
TIMED_ROWS = (1, 4, 16)
TIMED_STEPS = 5


class Guesser(Protocol):
    """What guesses the token after each state."""

    def draft(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest token after each state, int64 [T], and its probability, float32 [T]."""


@dataclass
class Unread:
    """What was not read of a request."""

    position: int
    """Of the first."""
    token_ids: list[int]
    features: list[tuple[torch.Tensor, int, int]] = field(default_factory=list)
    """The target's at these positions, of a drafter that reads them, in parts: [rows, F], the first row and the end."""
    is_lost: bool = False
    """There was too much."""


class ChainDrafter(ABC):
    """Drafts on the engine's thread, for a `DecodeBatch`."""

    name: str
    """Short and lower-case: part of the names of metrics."""

    def __init__(self, engine: Engine, guesser: Guesser, cache: PagedLayers) -> None:
        """`cache`: of what it reads tokens with."""
        self._engine = engine
        self._guesser = guesser
        self._cache = cache
        self._unread: dict[Key, Unread] = {}
        self.seconds = 0.0
        """What the last `draft` took."""

    @abstractmethod
    def _joined(self, seen: Seen[Key]) -> Unread:
        """What is to be read of a request before the tokens that its first step has made."""

    @abstractmethod
    def _features(self, rows: int) -> torch.Tensor | None:
        """The first rows' in the step that has just ended, if it reads them. The next step overwrites them."""

    @abstractmethod
    def _first_states(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """The states [T, H] to read tokens with whose features are these."""

    @abstractmethod
    def _forward(self, states: torch.Tensor, packed: ForwardBatch) -> torch.Tensor:
        """Read these tokens; returns the states [T, H] after them."""

    def _read(
        self,
        batch: DecodeBatch[Key],
        states: torch.Tensor,
        keys: Sequence[Key],
        positions: Sequence[int],
        token_ids: Sequence[Sequence[int]],
    ) -> torch.Tensor:
        """Read these tokens of each request from its position on; returns the states [T, H] after them."""
        return self._forward(states, batch.pack(keys, positions, token_ids, self._cache))

    def draft(self, batch: DecodeBatch[Key], depth: int) -> dict[Key, Draft]:
        """Up to `depth` tokens for requests of the step that has just ended. To be called after each step.

        A request that is far behind gets no draft.
        """
        started = time.perf_counter()
        self._follow(batch, waits=depth == 0)
        drafts = self._draft(batch, depth) if depth > 0 else {}
        self.seconds = time.perf_counter() - started
        return drafts

    @torch.inference_mode()
    def _draft(self, batch: DecodeBatch[Key], depth: int) -> dict[Key, Draft]:
        states, keys, positions = self._catch_up(batch)
        for one in self._unread.values():
            for part, first, end in one.features[-1:]:  # not read, after all
                one.features[-1] = part[first:end].clone(), 0, end - first
        if not keys:
            return {}
        return draft_chains(self._guesser, partial(self._read, batch), batch, states, keys, positions, depth)

    def _follow(self, batch: DecodeBatch[Key], *, waits: bool) -> None:
        """Take in what the step has settled; `waits`: nothing of it will be read before the next one."""
        features: torch.Tensor | None = None
        for seen in reversed(batch.seen):  # so that the first that needs features needs the most
            unread = self._unread.get(seen.key)
            if unread is None:
                unread = self._unread[seen.key] = self._joined(seen)
            if unread.is_lost:
                continue
            end = seen.first_row + len(seen.token_ids)
            if features is None:
                features = self._features(end)
                features = features.clone() if waits and features is not None else features
            if features is not None:
                unread.features.append((features, seen.first_row, end))
            unread.token_ids += seen.token_ids
            if len(unread.token_ids) > MAX_UNREAD:
                unread.features, unread.token_ids, unread.is_lost = [], [], True
        if len(self._unread) > len(batch.seen):
            stays = {seen.key for seen in batch.seen}
            self._unread = {key: unread for key, unread in self._unread.items() if key in stays}

    def _catch_up(self, batch: DecodeBatch[Key]) -> tuple[torch.Tensor, list[Key], list[int]]:
        """Read what waits, of all requests or of those least behind; returns their newest states and positions."""
        counts = {
            key: len(one.token_ids)
            for key, one in self._unread.items()
            if one.position + len(one.token_ids) <= batch.room(key)
        }
        keys = to_be_read(counts)
        if not keys:
            return torch.empty(0), [], []
        reads = [self._unread[key] for key in keys]
        states = self._first_states([part[first:end] for one in reads for part, first, end in one.features])
        states = self._read(batch, states, keys, [one.position for one in reads], [one.token_ids for one in reads])
        for one in reads:
            one.position += len(one.token_ids)
            one.features, one.token_ids = [], []
        positions = [one.position - 1 for one in reads]
        if len(keys) == 1:
            return states[-1:], keys, positions
        ends = torch.tensor([counts[key] for key in keys]).cumsum(0) - 1
        return states[ends.to(states.device)], keys, positions

    @torch.inference_mode()
    def time_tokens(self) -> Mapping[int, float]:
        """Seconds that one more token costs, by the number of requests it is drafted for: the fastest of several."""
        engine = self._engine
        batch, fastest = DecodeBatch[Key](engine), dict[int, float]()
        pages, keys = engine.pool.allocate(1), list[Key]()
        for rows in TIMED_ROWS:
            if rows > engine.config.max_num_seqs:
                break
            while len(keys) < rows:
                keys.append(("timed", len(keys)))
                batch.join(keys[-1], [0, 0], 1, pages, SamplingParams(max_tokens=2))
            states = torch.zeros(rows, engine.model_config.hidden_size, dtype=engine.model.features.dtype)
            for _ in range(TIMED_STEPS):
                started = time.perf_counter()
                read = self._read(batch, states, keys, [1] * rows, [[0]] * rows)
                self._guesser.draft(read)[0].tolist()  # waits for it
                seconds = time.perf_counter() - started
                fastest[rows] = min(fastest.get(rows, seconds), seconds)
        engine.pool.release(pages)
        return fastest


def to_be_read(unread: Mapping[Key, int]) -> list[Key]:
    """Which requests to read now, given how many tokens each has to read."""
    left, found = MAX_UNREAD, []
    for key, count in sorted(unread.items(), key=lambda item: item[1]):
        if count > UP_TO_DATE:
            left -= count
        if count > 0 and left >= 0:
            found.append(key)
    return found


Read = Callable[[torch.Tensor, Sequence[Key], Sequence[int], Sequence[Sequence[int]]], torch.Tensor]
"""(states, keys, positions, tokens): have each request's guess read at its position; returns the states after them."""


def draft_chains(
    guesser: Guesser,
    read: Read,
    batch: DecodeBatch[Key],
    states: torch.Tensor,
    keys: Sequence[Key],
    positions: Sequence[int],
    depth: int,
) -> dict[Key, Draft]:
    """Draft from these states; a request whose pages are full, or whose draft has become doubtful, stops there.

    Guesses are read into slots of the requests' pages that later readings overwrite: so refused tokens leave nothing to
    roll back.
    """
    drafted: dict[Key, tuple[list[int], list[int]]] = {key: ([], []) for key in keys}
    going, at, chances = list(keys), list(positions), [1.0] * len(keys)
    for step in range(depth):
        tokens, sure = (column.tolist() for column in guesser.draft(states))
        for key, token, one in zip(going, tokens, sure, strict=True):
            drafted[key][0].append(token)
            drafted[key][1].append(confidence_depth(step, one))
        if step + 1 == depth:
            break
        chances = [chance * one for chance, one in zip(chances, sure, strict=True)]
        goes_on = [row for row, key in enumerate(going) if at[row] + 1 < batch.room(key) and chances[row] >= DOUBTFUL]
        if len(goes_on) < len(going):
            if not goes_on:
                break
            states, going, at = states[goes_on], [going[row] for row in goes_on], [at[row] for row in goes_on]
            tokens, chances = [tokens[row] for row in goes_on], [chances[row] for row in goes_on]
        at = [position + 1 for position in at]
        states = read(states, going, at, [[token] for token in tokens])
    return {key: Draft(*columns) for key, columns in drafted.items()}


def confidence_depth(step: int, probability: float) -> int:
    """A drafted token's depth: how far into the draft it is, and how sure its drafter is of it."""
    return min(step, STEPS_APART - 1) * CONFIDENCES + min(int(probability * CONFIDENCES), CONFIDENCES - 1)
