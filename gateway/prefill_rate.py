"""How many prompt tokens a second get their first output token: what a backlog is divided by to know its end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

BUSY_MEMORY_SECONDS = 10.0
"""While there is a backlog, what lies further back counts for little."""
IDLE_MEMORY_SECONDS = 60.0
"""The same while there is none, and nothing new to learn."""
EVIDENCE_SECONDS = 1.0
"""So long a backlog has to be seen to be believed; until then, what the workers say of themselves fills in."""
EVIDENCE_PROMPTS = 4.0


class PrefillRate:
    """Tokens a second over the time in which there is a backlog, by worker.

    Only then is the rate the mesh's and not its clients'. It counts all that limits it: where decode workers have no
    room, prompts are not handed over, and the rate sinks.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = clock()
        self._tokens = 0.0
        self._prompts = 0.0
        self._seconds = 0.0
        """Of workers: two of them in one second count twice."""
        self._workers = 0.0
        self._since = 0.0
        """Seconds with a backlog since tokens were last counted; long prompts come in lumps."""
        self._worker_seconds_since = 0.0

    def observe(self, tokens: int, workers: float) -> None:
        """`tokens` were prefilled. From now on there is a backlog for so many workers; 0 where there is none."""
        self._pass_time()
        if tokens and self._since:
            fade = math.exp(-self._since / BUSY_MEMORY_SECONDS)
            mean_weight = BUSY_MEMORY_SECONDS * (1 - fade) / self._since
            self._tokens = self._tokens * fade + tokens * mean_weight
            self._prompts = self._prompts * fade + mean_weight
            self._seconds = self._seconds * fade + self._worker_seconds_since * mean_weight
        if tokens or not workers:
            self._since = self._worker_seconds_since = 0.0
        self._workers = workers

    def __call__(self, workers: float, published: float | None) -> float | None:
        """Tokens a second of so many workers; None while nothing is known.

        `published`: what one of them computes in a second, by its own account.
        """
        self._pass_time()
        missing = max(EVIDENCE_SECONDS - self._seconds, 0.0)
        if self._prompts < EVIDENCE_PROMPTS:
            return None if published is None else published * workers
        if published is None and missing:
            return None
        return (self._tokens + (published or 0.0) * missing) / (self._seconds + missing) * workers

    def _pass_time(self) -> None:
        now = self._clock()
        passed, self._at = now - self._at, now
        if self._workers:
            self._since += passed
            self._worker_seconds_since += passed * self._workers
        else:
            fade = math.exp(-passed / IDLE_MEMORY_SECONDS)
            self._tokens *= fade
            self._prompts *= fade
            self._seconds *= fade
