"""Whose request goes next: start-time fair queueing (Goyal, Vin and Cheng, 1996) between callers, by tokens.

Callers of the highest priority come first. Those of the same priority share by weight: each has a virtual time, which
grows by tokens over weight with what it gets, and the one that is furthest behind is next. Who comes back after a pause
starts at the time of those that were served meanwhile: nobody saves up. A caller's own requests go by their priority,
then in order of arrival. Pure bookkeeping: no clock, no I/O.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from headrace.gateway.callers import Caller

T = TypeVar("T")


@dataclass
class _Level(Generic[T]):
    """Requests of one caller and one priority, the oldest first, with their tokens."""

    requests: OrderedDict[T, int] = field(default_factory=OrderedDict)
    tokens: int = 0


@dataclass
class _Flow(Generic[T]):
    """What waits of one caller."""

    caller: Caller
    levels: dict[int, _Level[T]] = field(default_factory=dict)
    """By the requests' priority. None is empty."""
    tokens: int = 0
    count: int = 0


class FairQueue(Generic[T]):
    """Requests that wait, each with a number of tokens."""

    def __init__(self) -> None:
        self._flows: dict[str, _Flow[T]] = {}
        """Of the callers that wait, by name."""
        self._places: dict[T, tuple[str, int]] = {}
        self._times: dict[str, float] = {}
        """Virtual time of each caller that was served since the queue was empty."""
        self._now: dict[int, float] = {}
        """Virtual time of each priority: that of the caller served last."""

    def __len__(self) -> int:
        return len(self._places)

    @property
    def tokens(self) -> int:
        """Of all that wait."""
        return sum(flow.tokens for flow in self._flows.values())

    def waiting(self, caller: Caller) -> tuple[int, int]:
        """A caller's requests, and their tokens."""
        flow = self._flows.get(caller.name)
        return (flow.count, flow.tokens) if flow else (0, 0)

    def push(self, item: T, caller: Caller, tokens: int, priority: int = 0) -> None:
        """Have `item` wait."""
        assert item not in self._places, item
        flow = self._flows.setdefault(caller.name, _Flow(caller))
        level = flow.levels.setdefault(priority, _Level())
        level.requests[item] = tokens
        level.tokens += tokens
        flow.tokens += tokens
        flow.count += 1
        self._places[item] = caller.name, priority
        self._times[caller.name] = self._time(caller)

    def pop(self) -> tuple[T, int]:
        """The next request and its tokens, which count as served. There must be one."""
        flow = min(self._flows.values(), key=lambda flow: (-flow.caller.priority, self._times[flow.caller.name]))
        caller = flow.caller
        item, tokens = next(iter(flow.levels[max(flow.levels)].requests.items()))
        self._now[caller.priority] = self._times[caller.name]
        self._times[caller.name] += tokens / caller.weight
        self.discard(item)
        return item, tokens

    def discard(self, item: T) -> bool:
        """Forget a request; False where it does not wait."""
        if item not in self._places:
            return False
        name, priority = self._places.pop(item)
        flow = self._flows[name]
        level = flow.levels[priority]
        tokens = level.requests.pop(item)
        level.tokens -= tokens
        flow.tokens -= tokens
        flow.count -= 1
        if not level.requests:
            del flow.levels[priority]
        if not flow.levels:
            del self._flows[name]
        if not self._flows:
            self._times.clear()
            self._now.clear()
        return True

    def charge(self, caller: Caller, tokens: float) -> None:
        """Count tokens that a caller got elsewhere, as long as somebody waits."""
        if self._flows:
            self._times[caller.name] = self._time(caller) + tokens / caller.weight

    def ahead_of(self, caller: Caller, priority: int = 0) -> float:
        """Tokens that would be served before one more request of this caller, if nobody else came."""
        flow = self._flows.get(caller.name)
        own = sum(level.tokens for at, level in flow.levels.items() if at >= priority) if flow else 0
        begins = self._time(caller) + own / caller.weight
        ahead = float(own)
        for other in self._flows.values():
            if other is flow or other.caller.priority < caller.priority:
                continue
            if other.caller.priority > caller.priority:
                ahead += other.tokens
            else:
                behind = (begins - self._times[other.caller.name]) * other.caller.weight
                ahead += min(max(behind, 0.0), other.tokens)
        return ahead

    def _time(self, caller: Caller) -> float:
        return max(self._times.get(caller.name, 0.0), self._now.get(caller.priority, 0.0))
