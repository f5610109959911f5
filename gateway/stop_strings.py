"""Finds stop strings in text that comes in pieces, and holds back only what may be the start of one."""

from __future__ import annotations

from collections.abc import Sequence

MAX_STOP_STRING = 1024
"""Longest stop string in characters; also the most text that is ever held back."""


class StopStrings:
    """Knuth-Morris-Pratt matchers for several strings, advanced together, a character at a time.

    The string that is complete first wins, whatever the pieces; of two complete at once, the longer. An answer is thus
    the same however its tokens were grouped. Amortised cost a character: one step a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(0 < len(stop) <= MAX_STOP_STRING for stop in stops), "checked by the request's schema"
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.found: str | None = None
        """The one that ended the text."""

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return the text now safe to show and whether a stop string ended it."""
        if not self._stops:
            return text, False
        pending = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            if (found := self._advance(character)) > 0:
                self._held, self.found = "", pending[end - found : end]
                return pending[: end - found], True
        safe = len(pending) - max(self._matched)
        self._held = pending[safe:]
        return pending[:safe], False

    def flush(self) -> str:
        """The text held back, once no more will come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> int:
        """Feed one character; the length of the longest stop string that it completes, or 0."""
        longest = 0
        for index, (stop, borders) in enumerate(self._stops):
            length = self._matched[index]
            while length > 0 and stop[length] != character:
                length = borders[length - 1]
            if stop[length] == character:
                length += 1
            if length == len(stop):
                longest = max(longest, length)
                length = borders[length - 1]
            self._matched[index] = length
        return longest


def _borders(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper border (the KMP failure function)."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length > 0 and pattern[index] != pattern[length]:
            length = borders[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        borders[index] = length
    return borders
