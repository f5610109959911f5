"""What speculation may lose."""

from __future__ import annotations

import math

LOSS = 0.005
"""Share of the time that steps take without it."""
MOST_OWED = 0.25
"""In steps: so after a loss there is a pause of fifty of them at most."""
MOST_SAVED = 0.05
"""In seconds: what gains excuse, and what may be lost at the start, before anything is known."""


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
