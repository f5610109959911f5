"""The rows of prompts in a forward pass: which tokens, where their K and V go, and where each prompt's last one is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from headrace.kernels.launch import ALIGNMENT
from headrace.kernels.prefill_attention import FEW_TOKENS, TilePlan, choose_tiling, cut_tiles

if TYPE_CHECKING:
    from headrace.engine.engine import PrefillChunk

MAX_PROMPTS = 32
"""Of a pass with decode steps. Each of them may leave a tile of attention almost empty."""


@dataclass(frozen=True)
class LaidOut:
    """Chunks, packed one after the other: T tokens of B chunks."""

    token_ids: np.ndarray
    """[T] int64."""
    positions: np.ndarray
    """[T] int64."""
    slot_pages: np.ndarray
    """[T] int64: the page that each token's K and V go to."""
    slot_offsets: np.ndarray
    """[T] int64: and where in that page."""
    table: np.ndarray
    """[B, most pages] int64."""


def lay_out(chunks: Sequence[PrefillChunk], page_size: int) -> LaidOut:
    """Say where each of the chunks' tokens belongs."""
    table = np.zeros((len(chunks), max(len(chunk.pages) for chunk in chunks)), np.int64)
    tokens, positions, slot_pages = [], [], []
    for row, chunk in enumerate(chunks):
        table[row, : len(chunk.pages)] = chunk.pages
        own = np.arange(chunk.start, chunk.start + chunk.length)
        tokens.append(np.array(chunk.token_ids[chunk.start : chunk.start + chunk.length], np.int64))
        positions.append(own)
        slot_pages.append(table[row, own // page_size])
    at = np.concatenate(positions)
    return LaidOut(np.concatenate(tokens), at, np.concatenate(slot_pages), at % page_size, table)


class PromptRows:
    """The same where a captured graph reads it: behind the rows of running requests, in memory that stays in its place.

    All of it is one int32 tensor, which one copy fills, with the block tables last, for a pass needs few of them. Tiles
    of attention that a pass does not need belong to a request without queries.
    """

    def __init__(
        self, most_rows: int, table_width: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """`heads`: query heads a KV head, and numbers a head; `dtype`: the cache's."""
        group, head_dim = heads
        self._group = group
        self._tiling = choose_tiling(head_dim, dtype, has_prefix=True, tokens=FEW_TOKENS - 1)
        lengths = {
            "tokens": most_rows,
            "positions": most_rows,
            "pages": most_rows,
            "offsets": most_rows,
            "tiles": 2 * self._most_tiles(most_rows),
            "starts": MAX_PROMPTS + 2,
            "contexts": MAX_PROMPTS + 1,
            "ends": MAX_PROMPTS,
            "table": MAX_PROMPTS * table_width,
        }
        aligned = ALIGNMENT // 4
        starts = np.cumsum([0, *[-(-length // aligned) * aligned for length in lengths.values()]]).tolist()
        self._places = {
            name: slice(start, start + length) for (name, length), start in zip(lengths.items(), starts, strict=False)
        }
        self._width = table_width
        self._memory = torch.zeros(starts[-1], dtype=torch.int32, device=device)
        empty = np.zeros(self._places["table"].start, np.int32)
        empty[self._places["tokens"]] = empty[self._places["pages"]] = -1
        empty[self._places["tiles"]] = [MAX_PROMPTS, 0] * (lengths["tiles"] // 2)
        self._empty = empty
        self._memory[: len(empty)].copy_(torch.from_numpy(empty))

    def _most_tiles(self, rows: int) -> int:
        return rows // (self._tiling.block_m // self._group) + MAX_PROMPTS

    def __getitem__(self, name: str) -> torch.Tensor:
        """int32, on the device. `tokens`: -1 in rows without a prompt, and so are `pages`. `ends`: the wanted rows."""
        return self._memory[self._places[name]]

    def plan(self, rows: int) -> TilePlan:
        """Who attends to what in a pass of up to so many rows."""
        return TilePlan(
            tiles=self["tiles"].view(-1, 2)[: self._most_tiles(rows)],
            query_starts=self["starts"],
            context_lengths=self["contexts"],
            block_table=self["table"].view(-1, self._width),
            tiling=self._tiling,
            has_prefix=True,
        )

    def fill(self, chunks: Sequence[PrefillChunk], first_row: int, wanted: Sequence[int], page_size: int) -> None:
        """Send the chunks, whose rows begin at `first_row`; the last rows of the `wanted` chunks are `ends`, in order.

        Nothing waits for the device.
        """
        laid_out = lay_out(chunks, page_size)
        lengths = np.array([chunk.length for chunk in chunks], np.int32)
        contexts = np.array([chunk.start + chunk.length for chunk in chunks], np.int32)
        starts = first_row + np.concatenate((np.zeros(1, np.int32), lengths.cumsum(dtype=np.int32)))
        tiles = cut_tiles(lengths, contexts, self._tiling.block_m // self._group).reshape(-1)
        size = self._places["table"].start + len(chunks) * self._width
        # the last pass may not have read what it was sent, so each has memory of its own, from torch's cache
        sent = torch.empty(size, dtype=torch.int32, pin_memory=self._memory.is_cuda)
        host = sent.numpy()
        host[: len(self._empty)] = self._empty
        for name, values in {
            "tokens": laid_out.token_ids,
            "positions": laid_out.positions,
            "pages": laid_out.slot_pages,
            "offsets": laid_out.slot_offsets,
        }.items():
            first = self._places[name].start + first_row
            host[first : first + len(values)] = values
        for name, values in {"tiles": tiles, "contexts": contexts, "ends": starts[1:][list(wanted)] - 1}.items():
            first = self._places[name].start
            host[first : first + len(values)] = values
        own = host[self._places["starts"]]
        own[:], own[: len(starts)] = starts[-1], starts
        table = host[self._places["table"].start :].reshape(len(chunks), self._width)
        table[:, : laid_out.table.shape[1]] = laid_out.table
        self._memory[:size].copy_(sent, non_blocking=True)
