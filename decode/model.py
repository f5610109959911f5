"""Drafts of a smaller model, all on the thread that runs the engine.

It reads each token of a request, as the target does. A prompt's keys and values were computed by the prefill worker and
came with the target's. Where some are missing, as after a move of a request whose tokens had not been read, its guesses
are worse and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headrace.decode.chain import ChainDrafter, Unread
from headrace.decode.sequence import Key
from headrace.engine.batch import ForwardBatch
from headrace.engine.decode_batch import Seen
from headrace.engine.engine import Engine


class ModelDrafter(ChainDrafter):
    """Of an engine with a draft model."""

    name = "model"

    def __init__(self, engine: Engine) -> None:
        assert engine.draft is not None, "the engine has no draft model"
        super().__init__(engine, engine.draft, engine.draft.cache)
        self._model = engine.draft

    def _joined(self, seen: Seen[Key]) -> Unread:
        return Unread(seen.position, [seen.token_id])

    def _features(self, rows: int) -> None:
        return None

    def _first_states(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.empty(0)

    def _forward(self, states: torch.Tensor, packed: ForwardBatch) -> torch.Tensor:
        return self._model.forward(packed)
