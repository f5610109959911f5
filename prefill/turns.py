"""When a prefill step may run, and how large it may be."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Turns(Protocol):
    """Asked before each step; around it as it runs."""

    async def turn(self, handing_over: bool) -> int:
        """Wait for the next step's turn; returns how many prompt tokens it may compute.

        `handing_over`: there are requests whose prompts are computed and that no decode worker has acknowledged.
        """

    def computing(self, tokens: int) -> AbstractContextManager[None]:
        """Around a step, on the thread that computes it."""


class OwnDevice:
    """There is nobody to take turns with."""

    def __init__(self, token_budget: int) -> None:
        self._token_budget = token_budget

    async def turn(self, handing_over: bool) -> int:
        """See `Turns`."""
        return self._token_budget

    def computing(self, tokens: int) -> AbstractContextManager[None]:
        """See `Turns`."""
        return nullcontext()
