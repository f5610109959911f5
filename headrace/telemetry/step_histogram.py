"""A histogram for what happens at each decode step: an observation takes a microsecond, where prometheus_client's takes
ten, as it locks. It is written and read on the event loop alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily, Metric


class Observed:
    """The observations of one worker."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.counts = [0] * (len(bounds) + 1)
        """By bucket, the last one without a bound."""
        self.sum = 0.0
        self._bounds = bounds

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class StepHistogram:
    """A collector for prometheus_client, of all workers in this process."""

    def __init__(self, name: str, help: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self._name, self._help, self._labels, self._bounds = name, help, labels, bounds
        self._observed: dict[tuple[str, ...], Observed] = {}

    def labels(self, *values: str) -> Observed:
        """Where one worker's observations go."""
        return self._observed.setdefault(values, Observed(self._bounds))

    def collect(self) -> Iterable[Metric]:
        """See `prometheus_client.registry.Collector`."""
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        bounds = [*map(str, self._bounds), "+Inf"]
        for values, observed in self._observed.items():
            buckets = [(bound, float(count)) for bound, count in zip(bounds, accumulate(observed.counts), strict=True)]
            family.add_metric(values, buckets, observed.sum)
        yield family
