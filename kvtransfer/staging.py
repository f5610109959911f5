"""Staging: host memory that takes pages of a GPU's cache so that receivers of the same machine can read them (`shm`).

Some blocks of it are one message's from the moment it is named until the receiver is done with it:

| state   | on                                            | does                            | next    |
| ------- | --------------------------------------------- | ------------------------------- | ------- |
| (free)  | `Staging.take`                                | leave the free list             | TAKEN   |
| TAKEN   | `begin`, on a data line's thread              | (pages are copied there)        | FILLING |
| FILLING | `end`                                         | (the receiver may read)         | FILLED  |
| FILLED  | `let_go`: Credit, Ack, or the handoff is over | free                            | GONE    |
| TAKEN   | `let_go`: the handoff is over                 | free                            | GONE    |
| FILLING | `let_go`: the handoff is over                 | nothing: the thread still writes | LEFT    |
| LEFT    | `end`                                         | free                            | GONE    |
| GONE    | `begin`                                       | nothing (False)                 | GONE    |
| GONE    | `let_go`                                      | nothing                         | GONE    |

So no two messages write to one block, and none is written to before the receiver has said that it has read it (or has
left, or has not answered an Abort for so long that the registry has dropped it, as with pages that are read in place).
That is why the bytes need no checksum here.

Pages are copied there whole, as they lie in the cache: a receiver that cuts them anew picks its rows here
(`reshard.py`), and each of its ranks has messages, and so blocks, of its own.
"""

from __future__ import annotations

import threading
from collections import deque
from enum import Enum, auto


class _State(Enum):
    TAKEN = auto()
    FILLING = auto()
    FILLED = auto()
    LEFT = auto()
    GONE = auto()


class Staging:
    """Which blocks are free. Thread-safe."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        """The longest free first: what comes back in order goes out as neighbours, which are copied at once."""
        self.lock = threading.Lock()

    @property
    def num_free(self) -> int:
        """Blocks that `take` could give."""
        return len(self._free)

    def take(self, count: int) -> Staged | None:
        """Blocks for `count` pages; None while there are not enough."""
        with self.lock:
            if count > len(self._free):
                return None
            return Staged(self, [self._free.popleft() for _ in range(count)])

    def give_back(self, blocks: list[int]) -> None:
        """Called by `Staged`, which holds the lock."""
        self._free.extend(blocks)

    def check_integrity(self) -> None:
        """Assert that no block is free twice."""
        assert len(set(self._free)) == len(self._free) <= self.num_blocks


class Staged:
    """One message's blocks."""

    def __init__(self, staging: Staging, blocks: list[int]) -> None:
        self.blocks = blocks
        self._staging = staging
        self._state = _State.TAKEN

    def begin(self) -> bool:
        """Whether the pages are still wanted; if so they are to be copied to `blocks`, and then `end` be called."""
        with self._staging.lock:
            if self._state is not _State.TAKEN:
                return False
            self._state = _State.FILLING
            return True

    def end(self) -> None:
        """Nothing writes to the blocks any more."""
        with self._staging.lock:
            if self._state is _State.LEFT:
                self._free()
            else:
                assert self._state is _State.FILLING, self._state
                self._state = _State.FILLED

    def let_go(self) -> None:
        """The receiver will not read them."""
        with self._staging.lock:
            if self._state is _State.FILLING:
                self._state = _State.LEFT
            elif self._state in (_State.TAKEN, _State.FILLED):
                self._free()

    def _free(self) -> None:
        self._state = _State.GONE
        self._staging.give_back(self.blocks)
