"""What speculation may lose."""

from __future__ import annotations

import math

LOSS = 0.005
"""Share of the time that steps take without it."""
MOST_OWED = 0.25
"""In steps: so after a loss there is a pause of fifty of them at most."""
MOST_SAVED = 0.05
"""In seconds: what gains excuse, and what may be lost at the start, before anything is known."""
MAX_STEPS_AHEAD = 15
"""At most so many steps start without a look whether drafts would pay."""
LOOKING_SHARE = 0.0025
"""Of the time, which looks that find nothing may take where steps wait for them: the dearer, the fewer."""
STEPS_MORE = 0.25
"""By so much the steps between two such looks grow, as drafts often come back soon."""
REQUESTS_A_STEP_BESIDE_HEAD = 8
"""Where a head on the device drafts meanwhile there are more looks the fewer requests there are, by the square of their
number in units of this: a lookup must show more, and each look is evidence of it."""
SOME_REQUESTS, SHARE_BESIDE_HEAD, MOST_BESIDE_HEAD = 16, 0.01, 255
"""From so many on a look takes longer than the device has to do: so much of the time at most, and so many steps."""


class Balance:
    """What speculation has saved so far, in seconds, against decoding without it.

    It pauses where that is negative, until the share of time that it may lose has made up for it. So whatever is wrong
    with what is believed of drafts and costs, and whatever the search for drafts takes, it costs hardly more than this.
    """

    def __init__(self) -> None:
        self._saved = MOST_SAVED

    @property
    def pauses(self) -> bool:
        """Whether the next step is to have no drafts, and nobody is to look for some."""
        return self._saved < 0.0

    def add(self, saved: float, step: float, steps: int = 1) -> None:
        """So many steps that take `step` seconds each without drafts have saved so many seconds, or lost them."""
        saved += self._saved + LOSS * step * steps
        self._saved = min(max(saved, -MOST_OWED * step), MOST_SAVED)

    def lasts(self, step: float) -> int:
        """So many steps, each of which saves or loses what may be owed at most, change nothing of `pauses`."""
        return math.ceil(-self._saved / (LOSS * step)) if self.pauses else int(self._saved / (MOST_OWED * step))


class Looks:
    """When to look for drafts: where nothing is found some steps go on without a look, more of them each time."""

    def __init__(self, *, beside_head: bool) -> None:
        """`beside_head`: a head on the device drafts, too."""
        self._beside_head = beside_head
        self._apart = 0.0
        self._left = 0

    def skips(self) -> bool:
        """Whether the next step goes on without."""
        skips = self._left > 0
        self._left -= skips
        return skips

    def found(self, drafts: bool, requests: int, seconds: float, step: float) -> None:
        """A look for so many requests took so long, infinitely where that makes no difference; a step takes `step`."""
        if drafts:
            self._apart = self._left = 0
            return
        steps, more = seconds / max(step, 1e-9), 2 * self._apart + 1
        if self._beside_head:
            most = float((requests // REQUESTS_A_STEP_BESIDE_HEAD) ** 2)
            if requests >= SOME_REQUESTS:
                most = min(max(steps / SHARE_BESIDE_HEAD, most), MOST_BESIDE_HEAD)
        else:
            most = min(steps / LOOKING_SHARE, MAX_STEPS_AHEAD)
            if seconds < math.inf:
                more = self._apart + STEPS_MORE
        self._apart = min(more, most)
        self._left = int(self._apart)
