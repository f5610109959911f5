"""The requests of a decode step in columns. Most steps change none of them, and others only a row or two."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Column
from itertools import compress, count
from operator import is_not
from typing import TypeVar

import numpy as np

from headrace.decode.scheduler import DecodeScheduler
from headrace.decode.sequence import Key, Sequence
from headrace.engine.step_tokens import StepTokens
from headrace.messages.stream import FinishReason, TokenColumns

T = TypeVar("T")
NEVER = sys.maxsize


class Members:
    """A row for each key of a step; one whose request has left the batch has None. All steps in which these requests
    make tokens must be taken here, for they are counted: a request's position is that count and what its row has.

    Nothing here looks at each request in each step: some hundred objects are not in the processor's caches by then.
    """

    def __init__(self, scheduler: DecodeScheduler) -> None:
        self._scheduler = scheduler
        scheduler.on_leave.append(self._left)
        self._keys: Column[Key] = ()
        self._steps = 0
        self.sequences: list[Sequence | None] = []
        self._own: list[Key | None] = []
        """Their keys."""
        self._row_of: dict[Key, int] = {}
        self._rows_of: dict[str, bytearray] = {}
        """By gateway: 1 for each row that is one of its requests."""
        self._tokens: list[list[int]] = []
        self._positions = np.zeros(0, np.int64)
        """Of each newest output token, less the steps taken."""
        self._ends = np.zeros(0, np.int64)
        """Steps with which each has all the tokens that it may have."""
        self._first_end = NEVER
        self._stops: Counter[tuple[int, ...]] = Counter()
        """Rows by their stop tokens."""
        self._stop_token_ids: set[int] = set()
        """Of any of them."""
        self._gone: list[tuple[int, Sequence]] = []
        """Rows whose requests have left since the last step, which said a last token of theirs."""

    def forget(self) -> None:
        """Have no rows: a step is taken elsewhere, and the count would be wrong."""
        self.follow(())

    def follow(self, keys: Column[Key]) -> None:
        """Have the rows of a step that is to be taken."""
        self.let_go()
        if keys is self._keys:
            return
        self._keys = keys
        self._resize(len(keys))
        for row in [*compress(count(), map(is_not, keys, self._own))]:
            self._set(row, self._scheduler.running(keys[row]))
        self._first_end = int(self._ends.min(initial=NEVER))

    def _resize(self, size: int) -> None:
        before = len(self.sequences)
        if size == before:
            return
        for row in range(size, before):
            self._set(row, None)
        more = max(size - before, 0)
        self.sequences[size:] = [None] * more
        self._own[size:] = [None] * more
        self._tokens[size:] = [[] for _ in range(more)]
        for rows in self._rows_of.values():
            rows[size:] = bytes(more)
        self._positions = np.append(self._positions[:size], np.zeros(more, np.int64))
        self._ends = np.append(self._ends[:size], np.full(more, NEVER))

    def _left(self, key: Key) -> None:
        if (row := self._row_of.get(key)) is not None and (sequence := self.sequences[row]) is not None:
            self.sequences[row] = None
            self._gone.append((row, sequence))

    def let_go(self) -> None:
        """Say nothing more of those who left."""
        for row, sequence in self._gone:
            self._clear(row, sequence)
        self._gone.clear()

    def _set(self, row: int, sequence: Sequence | None) -> None:
        before, self.sequences[row] = self.sequences[row], sequence
        if before is not None:
            self._clear(row, before)
        if sequence is None:
            return
        self._own[row] = sequence.key
        self._row_of[sequence.key] = row
        self._rows_of.setdefault(sequence.gateway, bytearray(len(self.sequences)))[row] = 1
        self._tokens[row] = sequence.token_ids
        self._positions[row] = sequence.generated - 1 - self._steps
        self._ends[row] = self._steps + sequence.tokens_left
        self._stops[sequence.stop_token_ids] += 1
        self._stop_token_ids.update(sequence.stop_token_ids)

    def _clear(self, row: int, sequence: Sequence) -> None:
        if self._row_of[sequence.key] == row:  # or it has moved to another one
            del self._row_of[sequence.key]
        self._own[row], self._tokens[row], self._ends[row] = None, [], NEVER
        rows, stops = self._rows_of[sequence.gateway], sequence.stop_token_ids
        rows[row] = 0
        if 1 not in rows:
            del self._rows_of[sequence.gateway]
        self._stops[stops] -= 1
        if not self._stops[stops]:
            del self._stops[stops]
            self._stop_token_ids = set().union(*self._stops)

    def take(self, token_ids: list[int]) -> dict[int, FinishReason]:
        """Give each request its token; returns the rows of those that end with it, and why."""
        for tokens, token_id in zip(self._tokens, token_ids, strict=True):
            tokens.append(token_id)
        self._steps += 1
        ended = set[int]()
        if self._steps >= self._first_end:
            ended.update(np.flatnonzero(self._ends <= self._steps).tolist())
        if not self._stop_token_ids.isdisjoint(token_ids):
            ended.update(row for row, token_id in enumerate(token_ids) if token_id in self._stop_token_ids)
        reasons = dict[int, FinishReason]()
        for row in sorted(ended):
            sequence = self.sequences[row]
            if sequence is not None and (reason := sequence.finish_reason()) is not None:
                reasons[row] = reason
        return reasons

    def columns(self, step: StepTokens[Key], reasons: Mapping[int, FinishReason]) -> Iterator[tuple[str, TokenColumns]]:
        """What each gateway is told of the step that was taken last; `reasons` by row, of those that ended."""
        positions: list[int] = (self._positions + self._steps).tolist()
        for gateway, rows in self._rows_of.items():
            columns = TokenColumns(
                requests=_of_rows(rows, step.keys),
                positions=_of_rows(rows, positions),
                token_ids=_of_rows(rows, step.token_ids),
                logprobs=_by_index(rows, step.logprobs),
                finish_reasons=_by_index(rows, reasons),
            )
            yield gateway, columns


def _of_rows(rows: bytearray, column: Column[T]) -> list[T]:
    return [*compress(column, rows)] if 0 in rows else [*column]


def _by_index(rows: bytearray, values: Mapping[int, T]) -> dict[int, T]:
    """By index among `rows` what is by row."""
    return {rows.count(1, 0, row): value for row, value in values.items() if rows[row]}
