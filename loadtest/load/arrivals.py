"""What is asked for, and when: arrival processes, and lengths from distributions or from a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.errors import StartError
from headrace.scaling.trace import TraceRequest

LONGEST = 1_000_000
"""Tokens; what a distribution gives beyond is cut."""
FORMS = "a number, uniform:LOW:HIGH, normal:MEAN:SD[:MAX] or lognormal:MEDIAN:SIGMA[:MAX]"


@dataclass(frozen=True)
class Planned:
    """One request to make. `at` is seconds from the start; None where it waits for an earlier one to end."""

    at: float | None
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    """See `TraceRequest`."""


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts, as `FORMS` says."""

    kind: str
    first: float
    second: float = 0.0
    most: int = LONGEST

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Raises `StartError` with the forms that can be read."""
        kind, *numbers = text.split(":") if ":" in text else ("fixed", text)
        try:
            values = [float(number) for number in numbers]
            if len(values) not in {"fixed": (1,), "uniform": (2,), "normal": (2, 3), "lognormal": (2, 3)}[kind]:
                raise ValueError("too few or too many numbers")
            first, second, most = [*values, *(0.0, float(LONGEST))[len(values) - 1 :]]
            lengths = cls(kind, first, second, int(most))
            if not 1 <= lengths.first <= LONGEST or not 1 <= lengths.most <= LONGEST:
                raise ValueError("out of bounds")
            if lengths.second < 0 or (kind == "uniform" and lengths.second < lengths.first):
                raise ValueError("out of order")
        except (KeyError, ValueError, OverflowError) as error:
            raise StartError(f"can't read the length {text!r}: give {FORMS}; from 1 to {LONGEST} tokens") from error
        return lengths

    def __str__(self) -> str:
        if self.kind == "fixed":
            return f"{self.first:g}"
        most = f":{self.most}" if self.most != LONGEST else ""
        return f"{self.kind}:{self.first:g}:{self.second:g}{most}"

    def draw(self, count: int, random: np.random.Generator) -> list[int]:
        """`count` lengths of at least 1 token."""
        match self.kind:
            case "uniform":
                values = random.integers(int(self.first), int(self.second), count, endpoint=True).astype(float)
            case "normal":
                values = random.normal(self.first, self.second, count)
            case "lognormal":
                values = self.first * np.exp(random.normal(0.0, self.second, count))
            case _:
                values = np.full(count, self.first)
        return [int(value) for value in np.clip(np.rint(values), 1, self.most)]


def arrival_times(rate: float, count: int, random: np.random.Generator, burstiness: float = 1.0) -> list[float]:
    """Seconds, ascending: `count` arrivals in `count / rate` seconds.

    Gaps are drawn from a gamma distribution of shape `burstiness`: 1 is a Poisson process, less is burstier (the
    squared coefficient of variation is 1 / burstiness), infinity is a metronome. They are scaled so that no run is
    asked for more or less than its rate (by chance 320 Poisson arrivals would be off by 6 %). A Poisson process whose
    gaps, the one after the last arrival among them, are scaled so is one of which it is known how many arrive.
    """
    if np.isinf(burstiness):
        return [float(at) for at in np.arange(1, count + 1) / rate]
    times = np.cumsum(random.gamma(burstiness, size=count + 1))
    return [float(at) for at in times[:-1] * (count / rate / times[-1])]


@dataclass(frozen=True)
class Workload:
    """What a run's requests look like; all runs of a test draw from the same one."""

    prompt: Lengths
    output: Lengths
    burstiness: float = 1.0
    trace: Sequence[TraceRequest] = ()

    @property
    def trace_rate(self) -> float:
        """Requests a second as recorded; infinite where all came at once."""
        span = self.trace[-1].at
        return len(self.trace) / span if span else float("inf")

    def plan(self, rate: float | None, count: int, seed: int) -> list[Planned]:
        """`count` requests: at `rate` a second, or (None) one after the other.

        A trace gives its own lengths and order; its times are stretched to `rate`. It is played from its start, and
        again where it is too short.
        """
        random = np.random.default_rng(seed)
        if self.trace:
            return self._replay(rate, count)
        times = [None] * count if rate is None else arrival_times(rate, count, random, self.burstiness)
        prompts, outputs = self.prompt.draw(count, random), self.output.draw(count, random)
        return [Planned(*request) for request in zip(times, prompts, outputs, strict=True)]

    def _replay(self, rate: float | None, count: int) -> list[Planned]:
        length = len(self.trace)
        recorded = self.trace_rate
        planned = []
        for number in range(count):
            request = self.trace[number % length]
            at = None
            if rate is not None:
                at = (request.at * recorded + number // length * length) / rate if recorded < float("inf") else 0.0
            planned.append(Planned(at, request.prompt_tokens, request.output_tokens, request.hash_ids))
        return planned
