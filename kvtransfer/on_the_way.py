"""What a handoff has sent and its receiver has not credited: how much more may be sent, and what is overdue.

Two bounds hold: the handoff's window, which its Grant named, and the room on the way to the receiver, which all
handoffs share (`Flight`). What is larger than a bound travels alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from headrace.kvtransfer.base import PageId, Ready
from headrace.kvtransfer.staging import Staged

PATIENCE_SECONDS = 0.5
"""How long pages may be on the way, or a Commit unanswered, before the receiver is asked; more where it usually takes
longer."""
MAX_REPEATS = 4
"""How often a handoff sends again what did not come, each time with twice the patience; then the lease decides."""


@dataclass(frozen=True)
class Outgoing:
    """Pages for the data line to send."""

    sequence: int
    layers: range
    first_page: int
    """Index within the prompt."""
    page_ids: list[PageId]
    """Of each of the layers."""
    credit_wanted: bool
    ready: list[Ready]
    rank: int
    part: int
    heads: range | None
    """Those of the rank that travel; None: all."""
    staged: Staged | None
    """Where to copy them for the receiver to read."""


@dataclass
class Flight:
    """Page bytes on the way to one receiver, over all handoffs."""

    limit: int
    size: int = 0
    usual_seconds: float = 0.0
    """From a message's departure to the news that it has landed: the longest, of late."""

    def note(self, seconds: float) -> None:
        """A message has taken so long."""
        self.usual_seconds = max(seconds, 0.9 * self.usual_seconds)

    @property
    def patience(self) -> float:
        """After which a message is overdue, in seconds."""
        return max(PATIENCE_SECONDS, 4 * self.usual_seconds)


@dataclass
class Sent:
    """One message."""

    outgoing: Outgoing
    size: int
    at: float
    """When it was sent, for the last time."""


class OnTheWay:
    """Of one handoff."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.flight = Flight(2**62)
        self.sent: deque[Sent] = deque()
        """By sequence."""
        self.lost: deque[Outgoing] = deque()
        """Did not come, and is to be sent once more."""
        self.repeats = 0
        """How often something was lost."""
        self._clock = clock
        self._window_bytes = 0
        self._window_left = 0
        self._unasked_bytes = 0
        """Sent since credit was last asked for."""
        self._waits_since = 0.0
        """When the Commit, or the last question, was sent."""
        self._asked: float | None = None
        """When the receiver was asked what came, until it answers."""

    def open_window(self, size: int) -> None:
        """Granted: so many bytes may be on the way."""
        self._window_bytes = self._window_left = size

    def has_room(self, size: int) -> bool:
        """Whether so much more may be on the way."""
        in_window = not self.sent or size <= self._window_left
        return in_window and (not self.flight.size or self.flight.size + size <= self.flight.limit)

    def take_room(self, size: int, largest: int) -> bool:
        """For a message that is sent now. Returns whether to ask for credit with it; `largest` is what may follow.

        Before a bound is half full nothing need be asked for. After that, all that crowds the way to the receiver, and
        every eighth of the window. So who must wait waits for a message that will be credited.
        """
        self._window_left -= size
        self.flight.size += size
        self._unasked_bytes += size
        crowded = self.flight.size > self.flight.limit // 2
        half_full = self._window_left < self._window_bytes // 2
        full = self._window_left < largest
        eighth = half_full and self._unasked_bytes >= self._window_bytes // 8
        if crowded or full or eighth:
            self._unasked_bytes = 0
            return True
        return False

    def add(self, outgoing: Outgoing, size: int) -> None:
        """It was sent, and has taken its room."""
        self.sent.append(Sent(outgoing, size, self._clock()))

    def credited(self, end: int) -> list[Outgoing]:
        """The receiver says that all below `end` has landed: make room. Returns what that is."""
        if self._asked is None and not self.repeats:
            asking = [sent for sent in self.sent if sent.outgoing.sequence < end and sent.outgoing.credit_wanted]
            if asking:
                self.flight.note(self._clock() - asking[-1].at)
        landed = self.land(end)
        self._find_lost()
        return landed

    def land(self, end: int) -> list[Outgoing]:
        """Messages below `end` are on the way no more."""
        landed = []
        while self.sent and self.sent[0].outgoing.sequence < end:
            sent = self.sent.popleft()
            self._window_left += sent.size
            self.flight.size -= sent.size
            landed.append(sent.outgoing)
        return landed

    def _find_lost(self) -> None:
        """What was overdue when the receiver was asked, and has not come, is to be sent again."""
        if self._asked is None:
            return
        sent_by = self._asked - self._patience
        self._asked = None
        lost = [sent for sent in self.sent if sent.at <= sent_by]
        if lost:
            self.repeats += 1
            self.lost = deque(sent.outgoing for sent in lost)
            for sent in lost:
                sent.at = self._clock()

    @property
    def _patience(self) -> float:
        return self.flight.patience * (1 << self.repeats)

    def committed(self) -> None:
        """The Commit is sent: an Ack is waited for from now on."""
        self._waits_since = self._clock()

    def acknowledged(self) -> None:
        """It came."""
        if self._asked is None and not self.repeats:
            self.flight.note(self._clock() - self._waits_since)

    def seconds_until_overdue(self, is_committed: bool) -> float | None:
        """After which the receiver is to be asked; None where nothing is waited for."""
        if self.repeats > MAX_REPEATS or not (is_committed or self.sent):
            return None
        since = self._waits_since if is_committed else max(self._waits_since, self.sent[0].at)
        return max(since + self._patience - self._clock(), 0.0)

    def ask(self) -> None:
        """The receiver is asked now."""
        self._asked = self._waits_since = self._clock()
