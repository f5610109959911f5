"""Drafts of a head over the target's hidden states, all on the thread that runs the engine.

After each step a request has states for the positions that the step has settled, and the head reads the token after
each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headrace.decode.chain import ChainDrafter, Unread
from headrace.decode.sequence import Key
from headrace.engine.batch import ForwardBatch
from headrace.engine.decode_batch import Seen
from headrace.engine.draft_head import DraftHead
from headrace.engine.engine import Engine


class HeadDrafter(ChainDrafter):
    """Of an engine with a head."""

    name = "head"

    def __init__(self, engine: Engine) -> None:
        assert engine.head is not None, "the engine has no head"
        super().__init__(engine, engine.head, engine.cache)
        self._head: DraftHead = engine.head

    def _joined(self, seen: Seen[Key]) -> Unread:
        return Unread(seen.position, [])

    def _features(self, rows: int) -> torch.Tensor:
        return self._engine.model.features[:rows]

    def _first_states(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._head.fuse(features[0] if len(features) == 1 else torch.cat([*features]))

    def _forward(self, states: torch.Tensor, packed: ForwardBatch) -> torch.Tensor:
        return self._head.forward(states, packed, self._engine.cache)
