"""What a graph decoder computes, by the plain model, so that a CPU's mesh can share passes as a GPU's does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from headrace.engine.batch import ForwardBatch
from headrace.engine.engine import Engine, PrefillChunk
from headrace.kernels.draft_rows import RequestState, StepRows
from headrace.kernels.paged_attention import plan_decode

SIZES = [16, 32, 64]


class PlainDecoder:
    """See `GraphDecoder`. A step comes after the prompts beside it, as it does in a layer of the real one."""

    def __init__(self, engine: Engine, requests: int) -> None:
        self._engine = engine
        self.state = RequestState.empty(requests, 1, torch.device("cpu"))
        self.rows = StepRows(requests, torch.device("cpu"))
        self.block_table = torch.zeros(requests, engine.pool.pages_for(engine.max_model_len), dtype=torch.int32)
        self.limits = torch.zeros(requests, dtype=torch.int32)
        self.shared = 0
        """Steps that had prompts beside them."""

    def sizes(self, kind: str = "plain") -> list[int]:
        """Of shared steps."""
        assert kind == "shared"
        return SIZES

    def drop_size(self, size: int, kind: str) -> None:
        """All are alike here."""

    def can_share(self, rows: int, chunks: Sequence[PrefillChunk]) -> bool:
        """See `GraphDecoder`."""
        return rows + sum(chunk.length for chunk in chunks) <= SIZES[-1]

    def step(self, rows: int) -> torch.Tensor:
        """See `GraphDecoder`."""
        engine, positions = self._engine, self.state.positions[:rows].long()
        assert (positions >= 0).all()
        table, page_size = self.block_table[:rows].long(), engine.layout.page_size
        pages = table.gather(1, (positions // page_size).unsqueeze(1)).squeeze(1)
        plan = plan_decode(engine.cache.layer(0), table, [1] * len(positions), (positions + 1).tolist())
        batch = ForwardBatch(self.state.tokens[:rows].clone(), positions, pages, positions % page_size, plan)
        return engine.model.logits(engine.model.forward(batch, engine.cache, None))

    def step_shared(
        self, rows: int, chunks: Sequence[PrefillChunk], wanted: Sequence[int], started: Callable[[int], None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `GraphDecoder`."""
        engine, ends = self._engine, list(accumulate(chunk.length for chunk in chunks))
        hidden = engine.model.forward(engine._pack(chunks), engine.cache, None)
        started(engine.layout.num_layers)
        logits = engine.model.logits(hidden[[ends[index] - 1 for index in wanted]])
        if rows == 0:
            return logits, logits[:0]
        self.shared += 1
        return logits, self.step(rows)
