"""What steps cost on one kind of worker: measured once, then slept for, simulated with and planned by."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from typing import Annotated

import msgspec

from headrace.settings import SettingsError

Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]
Points = Annotated[list[tuple[Annotated[int, msgspec.Meta(ge=1)], Seconds]], msgspec.Meta(min_length=1, max_length=64)]


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Straight lines between measured points, the last one's slope beyond, and a part that grows with the context."""

    points: Points
    """(size, seconds), by rising size: prompt tokens of a prefill step, or rows of a decode step."""
    seconds_per_context: Seconds = 0.0
    """For each pair of a token that is computed and a token of KV that it attends to."""

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if sizes != sorted(set(sizes)):
            raise ValueError("points must be in order of size, each size once")

    def seconds(self, size: int, context: float) -> float:
        """Of a step of `size` tokens or rows (0: no step) that attends to `context` pairs in all."""
        if size == 0:
            return 0.0
        points = self.points
        if len(points) == 1 or size <= points[0][0]:
            line = points[0][1]
        else:
            right = max(min(bisect_left(points, (size, 0.0)), len(points) - 1), 1)
            (low, low_seconds), (high, high_seconds) = points[right - 1], points[right]
            line = low_seconds + (high_seconds - low_seconds) * (size - low) / (high - low)
        return line + self.seconds_per_context * context


class Handoff(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From the first token to the decode worker's acknowledgement, where pages of all but the last layer have left."""

    seconds: Seconds = 0.0
    bytes_per_token: Annotated[int, msgspec.Meta(ge=0)] = 0
    """KV of one token that is still to travel then."""
    bytes_per_second: Annotated[float, msgspec.Meta(gt=0)] = 1e9


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one worker holds; the defaults are the flags' own."""

    page_size: Annotated[int, msgspec.Meta(ge=1)] = 16
    pages: Annotated[int, msgspec.Meta(ge=1)] = 4096
    max_num_seqs: Annotated[int, msgspec.Meta(ge=1)] = 256
    max_num_batched_tokens: Annotated[int, msgspec.Meta(ge=1)] = 512
    max_num_prefills: Annotated[int, msgspec.Meta(ge=1)] = 8


class StepCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that a simulation needs to know of a worker. In a file: JSON of the same names."""

    machine: str
    """Where and with which model they were measured."""
    prefill: Cost
    decode: Cost
    handoff: Handoff = Handoff()
    limits: Limits = Limits()
    overhead_seconds: Seconds = 0.0
    """The rest of the way to a first token: HTTP, tokenizing, queue, publishing."""
    start_seconds: Seconds = 10.0
    """From the decision to start a worker until it serves."""

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second of one worker that has full steps to compute."""
        tokens = self.limits.max_num_batched_tokens
        return tokens / max(self.prefill.seconds(tokens, tokens * tokens / 2), 1e-9)

    def handoff_seconds(self, tokens: int) -> float:
        """Of a prompt of so many tokens."""
        return self.handoff.seconds + tokens * self.handoff.bytes_per_token / self.handoff.bytes_per_second

    @classmethod
    def read(cls, path: Path) -> StepCosts:
        """Raises `SettingsError` where the file can't be read or doesn't fit."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError) as error:
            raise SettingsError(
                f"{path} holds no step costs: {error}. `make bench-simulate` writes such a file"
            ) from error

    def write(self, path: Path) -> None:
        """As JSON that a person can read."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self)) + b"\n")
