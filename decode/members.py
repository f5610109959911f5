"""The requests of a decode step in columns. Most steps change none of them, and others only a row or two."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Column
from typing import Any, TypeVar

from headrace.decode.scheduler import DecodeScheduler
from headrace.decode.sequence import Key, Sequence
from headrace.engine.step_tokens import StepTokens
from headrace.messages.stream import FinishReason, TokenColumns

T = TypeVar("T")
NEVER = sys.maxsize


class Members:
    """A row for each key of a step; one whose request is gone meanwhile has None. All steps in which these requests
    make tokens must be taken here, for they are counted: a request's position is that count and what its row has.
    """

    def __init__(self, scheduler: DecodeScheduler) -> None:
        self._scheduler = scheduler
        self._keys: Column[Key] = ()
        self._num_taken_out = 0
        self._steps = 0
        self.sequences: list[Sequence | None] = []
        self._gateways: list[str | None] = []
        self._rows_of: dict[str, list[int]] = {}
        """By gateway."""
        self._tokens: list[list[int]] = []
        self._positions: list[int] = []
        """Of each newest output token, less the steps taken."""
        self._ends: list[int] = []
        """Steps with which each has all the tokens that it may have."""
        self._first_end = NEVER
        self._stop_token_ids: set[int] = set()
        """Of any of them."""

    def follow(self, keys: Column[Key]) -> None:
        """Have the rows of a step that is to be taken, or was taken last and has ended requests that are gone now."""
        if keys is self._keys and self._scheduler.num_taken_out == self._num_taken_out:
            return
        self._keys, self._num_taken_out = keys, self._scheduler.num_taken_out
        blanks: list[tuple[list[Any], Any]] = [
            (self.sequences, None),
            (self._gateways, None),
            (self._tokens, []),
            (self._positions, 0),
            (self._ends, NEVER),
        ]
        for column, blank in blanks:
            column[len(keys) :] = [blank] * (len(keys) - len(column))
        for row, (key, sequence) in enumerate(zip(keys, self.sequences, strict=True)):
            if sequence is None or sequence.key is not key or sequence.steps is None:
                self._set(row, self._scheduler.running(key))
        self._rows_of = {
            gateway: [row for row, own in enumerate(self._gateways) if own == gateway]
            for gateway in set(self._gateways)
            if gateway is not None
        }
        self._first_end = min(self._ends, default=NEVER)
        stops = {sequence.stop_token_ids for sequence in self.sequences if sequence is not None}
        self._stop_token_ids = set().union(*stops)

    def _set(self, row: int, sequence: Sequence | None) -> None:
        self.sequences[row] = sequence
        if sequence is None:
            self._gateways[row], self._tokens[row], self._ends[row] = None, [], NEVER
        else:
            self._gateways[row], self._tokens[row] = sequence.gateway, sequence.token_ids
            self._positions[row] = sequence.generated - 1 - self._steps
            self._ends[row] = self._steps + sequence.tokens_left

    def take(self, token_ids: list[int]) -> dict[int, FinishReason]:
        """Give each request its token; returns the rows of those that end with it, and why."""
        for tokens, token_id in zip(self._tokens, token_ids, strict=True):
            tokens.append(token_id)
        self._steps += 1
        if self._steps < self._first_end and self._stop_token_ids.isdisjoint(token_ids):
            return {}
        reasons = dict[int, FinishReason]()
        for row, (end, token_id) in enumerate(zip(self._ends, token_ids, strict=True)):
            if end <= self._steps or token_id in self._stop_token_ids:
                sequence = self.sequences[row]
                if sequence is not None and (reason := sequence.finish_reason()) is not None:
                    reasons[row] = reason
        return reasons

    def columns(self, step: StepTokens[Key], reasons: Mapping[int, FinishReason]) -> Iterator[tuple[str, TokenColumns]]:
        """What each gateway is told of the step that was taken last; `reasons` by row, of those that ended."""
        positions = [position + self._steps for position in self._positions]
        for gateway, rows in self._rows_of.items():
            columns = TokenColumns(
                requests=_at(rows, step.keys),
                positions=_at(rows, positions),
                token_ids=_at(rows, step.token_ids),
                logprobs=_by_index(rows, step.logprobs),
                finish_reasons=_by_index(rows, reasons),
            )
            yield gateway, columns


def _at(rows: list[int], column: Column[T]) -> list[T]:
    return list(column) if len(rows) == len(column) else [column[row] for row in rows]


def _by_index(rows: list[int], values: Mapping[int, T]) -> dict[int, T]:
    """By index into `rows` what is by row."""
    return {index: values[row] for index, row in enumerate(rows) if row in values} if values else {}
