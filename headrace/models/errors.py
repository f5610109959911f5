"""What can be wrong with a model's files."""

from __future__ import annotations


class ModelError(Exception):
    """The model can't be found, read or served; the message says what to do."""
