"""The search for the highest rate that is served in time."""

from __future__ import annotations

import math

MAX_RUNS = 32


class RateSearch:
    """Doubles or halves the rate until one is served and one is not, then bisects. Pure: told what came of each rate.

    `rate` is what to try next, None when the answer is known: `served` then is the highest rate that was, or 0 where
    none above `least` was. A rate is given up only after two runs in a row: one may have met a pause of the machine,
    and all else would follow from it.
    """

    def __init__(self, start: float, precision: float = 0.05, least: float = 0.01) -> None:
        self.rate: float | None = start
        self.served = 0.0
        self._not_served = math.inf
        self._precision = precision
        self._least = least
        self._runs = 0
        self._is_in_doubt = False

    def tell(self, was_served: bool) -> None:
        """Of the run at `rate`."""
        assert self.rate is not None
        self._runs += 1
        self._is_in_doubt = not was_served and not self._is_in_doubt
        if self._is_in_doubt and self._runs < MAX_RUNS:
            return
        if was_served:
            self.served = self.rate
        else:
            self._not_served = self.rate
        if self._not_served == math.inf:
            self.rate = self.served * 2
        elif self.served == 0:
            self.rate = self._not_served / 2
        else:
            self.rate = math.sqrt(self.served * self._not_served)
        is_found = self.served > 0 and self._not_served / self.served <= 1 + self._precision
        if is_found or self._runs >= MAX_RUNS or self.rate < self._least:
            self.rate = None
