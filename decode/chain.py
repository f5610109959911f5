"""Drafts that a head or a draft model makes, token after token, on the thread that runs the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from headrace.decode.drafter import Draft
from headrace.decode.sequence import Key
from headrace.engine.decode_batch import DecodeBatch
from headrace.engine.engine import Engine
from headrace.messages.request import SamplingParams

DOUBTFUL = 0.2
"""A draft whose tokens are all right with so little probability, as its drafter sees it, does not get longer."""
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


class ChainDrafter(Protocol):
    """Drafts on the engine's thread. To be called after each step."""

    name: str
    """Short and lower-case: part of the names of metrics."""
    seconds: float
    """What the last `draft` took."""

    def draft(self, batch: DecodeBatch[Key], depth: int) -> dict[Key, Draft]:
        """Up to `depth` tokens for requests of the step that has just ended."""

    def time_tokens(self) -> Mapping[int, float]:
        """Seconds that one more token costs, by the number of requests it is drafted for."""


class Guesser(Protocol):
    """What guesses the token after each state."""

    def draft(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest token after each state, int64 [T], and its probability, float32 [T]."""


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


@torch.inference_mode()
def time_tokens(engine: Engine, one_more: Callable[[DecodeBatch[int], int], torch.Tensor]) -> Mapping[int, float]:
    """See `ChainDrafter.time_tokens`: the fastest of several.

    `one_more(batch, rows)` has a token of each of the batch's requests read and returns what is guessed after it.
    """
    batch, fastest = DecodeBatch[int](engine), dict[int, float]()
    pages = engine.pool.allocate(1)
    for rows in TIMED_ROWS:
        if rows > engine.config.max_num_seqs:
            break
        while len(batch) < rows:
            batch.join(len(batch), [0, 0], 1, pages, SamplingParams(max_tokens=2))
        for _ in range(TIMED_STEPS):
            started = time.perf_counter()
            one_more(batch, rows).tolist()  # waits for it
            seconds = time.perf_counter() - started
            fastest[rows] = min(fastest.get(rows, seconds), seconds)
    engine.pool.release(pages)
    return fastest
