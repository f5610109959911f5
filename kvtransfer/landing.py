"""Where the pages of one handoff land: the part of a receiver that data lines' threads use.

| state   | on                                  | does                                | next    |
| ------- | ----------------------------------- | ----------------------------------- | ------- |
| OPEN    | `claim`: new, in bounds             | writers + 1 (True)                  | OPEN    |
| OPEN    | `claim`: sequence seen before       | nothing (False)                     | OPEN    |
| OPEN    | `claim`: anything else              | the problem (False), notify         | BROKEN  |
| OPEN    | `written`, all right                | writers - 1, count                  | OPEN    |
| OPEN    | `written`: credit is due, or it was the last page | notify                | OPEN    |
| OPEN    | `written`, damaged                  | writers - 1, the problem, notify    | BROKEN  |
| OPEN    | `interrupted`: the line broke       | writers - 1, it may be claimed again | OPEN   |
| BROKEN  | `claim`                             | nothing (False)                     | BROKEN  |
| any     | `close`                             | nothing may be claimed any more     | CLOSED  |
| CLOSED  | `written`, `interrupted`            | writers - 1; the last one notifies  | CLOSED  |

The pages of a CLOSED landing may be freed once it is `idle`: before that a thread may still write to them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from headrace.kvtransfer.messages import AbortCause, OnDataLine, PagesInPlace

Problem = tuple[AbortCause, str]


class Landing:
    """Thread-safe. The prompt has `num_pages`, of which the first `held` are here already, in every layer."""

    def __init__(
        self, num_pages: int, held: int, num_layers: int, notify: Callable[[], None], num_parts: int = 1
    ) -> None:
        """Each page comes in `num_parts` parts."""
        self._notify = notify
        self._lock = threading.Lock()
        self._num_pages = num_pages
        self._num_layers = num_layers
        self._missing = (num_pages - held) * num_layers * num_parts
        self._free = [bytearray(held) + b"\1" * (num_pages - held) for _ in range(num_layers * num_parts)]
        """By part, layer and page: 1 until claimed."""
        self._claimed: set[int] = set()
        self._written: set[int] = set()
        """Sequence numbers from `_next` on."""
        self._next = 0
        self._credited = 0
        self._credit_wanted = 0
        self._writers = 0
        self._closed = False
        self._notified = False
        self._progressed = False
        self.problem: Problem | None = None

    def claim(self, message: OnDataLine) -> bool:
        """Whether this message's pages are to be written, which the caller then does and calls `written`."""
        with self._lock:
            if self._closed or self.problem is not None or self._seen(message.sequence):
                return False
            problem = self._problem_with(message)
            if problem is None:
                end = message.first_page + message.num_pages
                for row in self._rows(message):
                    row[message.first_page : end] = bytes(message.num_pages)
                self._claimed.add(message.sequence)
                self._writers += 1
                return True
            self.problem = problem
            tell = self._must_notify()
        self._tell(tell)
        return False

    def _rows(self, message: OnDataLine) -> list[bytearray]:
        first = message.part * self._num_layers + message.layer
        return self._free[first : first + message.num_layers]

    def _seen(self, sequence: int) -> bool:
        return sequence < self._next or sequence in self._claimed

    def _problem_with(self, message: OnDataLine) -> Problem | None:
        end_layer = message.layer + message.num_layers
        if end_layer > self._num_layers or message.part * self._num_layers >= len(self._free):
            return "sequence", f"there is no layer {end_layer - 1}, or no part {message.part}"
        end = message.first_page + message.num_pages
        if end > self._num_pages:
            return "sequence", f"{message.num_pages} pages from {message.first_page} are more than were granted"
        if isinstance(message, PagesInPlace) and len(message.blocks) != message.num_pages * message.num_layers:
            return "sequence", f"{len(message.blocks)} blocks are not the same pages of {message.num_layers} layers"
        if not all(all(row[message.first_page : end]) for row in self._rows(message)):
            return "sequence", f"layer {message.layer}, page {message.first_page} is here already"
        return None

    def written(self, message: OnDataLine, problem: Problem | None) -> None:
        """A claimed message's bytes are in their pages, or `problem` says why they aren't."""
        with self._lock:
            self._writers -= 1
            self.problem = self.problem or problem
            self._progressed = True
            if problem is None:
                self._missing -= message.num_pages * message.num_layers
                self._written.add(message.sequence)
                while self._next in self._written:
                    self._written.remove(self._next)
                    self._claimed.remove(self._next)
                    self._next += 1
                if message.credit_wanted:
                    self._credit_wanted = max(self._credit_wanted, message.sequence + 1)
            tell = self._must_notify()
        self._tell(tell)

    def begin(self) -> bool:
        """The receiver is about to write to the pages itself, until `end`; False where they are not wanted any more."""
        with self._lock:
            if not self._closed:
                self._writers += 1
            return not self._closed

    def end(self) -> None:
        """It has."""
        with self._lock:
            self._writers -= 1
            tell = self._must_notify()
        self._tell(tell)

    def interrupted(self, message: OnDataLine) -> None:
        """A claimed message did not come to its end; its pages may be half written, and come once more."""
        with self._lock:
            self._writers -= 1
            self._claimed.discard(message.sequence)
            for row in self._rows(message):
                row[message.first_page : message.first_page + message.num_pages] = b"\1" * message.num_pages
            tell = self._must_notify()
        self._tell(tell)

    def _must_notify(self) -> bool:
        """Whether there is something to do now, and nobody has been told yet."""
        if self._closed:
            due = not self._writers
        else:
            due = self.problem is not None or self._missing == 0 or self._credit_is_due()
        if self._notified or not due:
            return False
        self._notified = True
        return True

    def _credit_is_due(self) -> bool:
        return self._next > self._credited and self._credit_wanted > self._credited

    def _tell(self, tell: bool) -> None:
        """Outside of the lock: who is told may look at once."""
        if tell:
            self._notify()

    def take_credit(self) -> int | None:
        """The sequence number to credit up to, where one is due. Called when notified."""
        with self._lock:
            self._notified = False
            if not self._credit_is_due():
                return None
            self._credited = self._next
            return self._next

    @property
    def num_landed(self) -> int:
        """Messages before the first that is missing."""
        with self._lock:
            return self._next

    def take_progress(self) -> bool:
        """Whether anything was written since this was last asked."""
        with self._lock:
            progressed, self._progressed = self._progressed, False
            return progressed

    def close(self) -> None:
        """Nothing more is wanted."""
        with self._lock:
            self._closed = True

    @property
    def idle(self) -> bool:
        """Whether no thread writes to the pages."""
        with self._lock:
            return self._writers == 0

    def problem_with_end(self, messages: int) -> Problem | None:
        """Why `messages` messages can't be all there are, if that is known already."""
        with self._lock:
            if self._next > messages or any(sequence >= messages for sequence in self._claimed):
                return "sequence", f"more messages came than the {messages} that were committed"
            if self._next == messages and self._missing:
                return "sequence", "committed before all pages were sent"
            return None

    def is_complete(self, messages: int) -> bool:
        """Whether all pages are here, by exactly `messages` messages."""
        with self._lock:
            return self._next == messages and self._missing == 0 and self._writers == 0
