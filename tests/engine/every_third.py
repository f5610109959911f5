"""A grammar without llguidance, for any vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class EveryThird:
    """A matcher whose grammar is: the n-th token of an output leaves the remainder n when divided by three."""

    def __init__(self) -> None:
        self.output: list[int] = []

    def start(self, output: Sequence[int]) -> None:
        """See `Matcher`."""
        self.output = list(output)

    def advance(self, token_ids: Sequence[int]) -> None:
        """See `Matcher`."""
        self.output += token_ids
        assert all(token % 3 == place % 3 for place, token in enumerate(self.output))

    def fill(self, masks: np.ndarray, draft: Sequence[int]) -> None:
        """See `Matcher`."""
        for step, row in enumerate(masks):
            bits = np.arange(len(row) * 32) % 3 == (len(self.output) + step) % 3
            row[:] = np.packbits(bits, bitorder="little").view(np.int32)
