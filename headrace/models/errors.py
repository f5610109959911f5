"""What can be wrong with a model that a user names."""

from __future__ import annotations

from headrace.errors import StartError


class ModelError(StartError):
    """The model can't be found, read or run; the message says what to do."""
