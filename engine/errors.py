"""What can stop an engine from starting."""

from __future__ import annotations

from headrace.errors import StartError


class EngineError(StartError):
    """The engine can't run as configured; the message names the flag to change."""
