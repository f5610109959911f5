"""The plan of a decode step's attention: how its work is cut into units, and who has which.

A unit is a block of cached tokens of one request and one KV head. Units are dealt out evenly to the programs, long and
short requests alike (stream-K, see `dealing`). With drafts, as many rows of a request as fit share a tile, and so their
units. `plan_decode_attention` runs once a step, before all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from headrace.kernels.launch import dependent_launch, is_hopper, num_processors, power_of_two

TILE_ROWS = 16
"""That tensor cores take at least."""
FEW_ROWS = 8
"""With no more rows most programs have one unit, and time is what counts."""
FEW_DRAFTED_ROWS = 16
"""The same with drafts: units are large, so that there are few parts to merge."""
SHARED_DIMS, SHARED_BLOCK = (64, 128), 16
"""Heads that `hopper_decode_attention` is made for, and its unit: as many tokens as the smallest page."""
MAX_STEP_ROWS = 16
"""Rows of one request in a step: its newest token's and its draft's."""


@dataclass(frozen=True)
class Tiling:
    """How a step's work is cut."""

    block: int
    """Cached tokens of a unit."""
    warps: int
    """Of a program."""
    programs: int
    """A processor."""
    first: Literal["registers", "L2", "shared"]
    """Where a program's first units are before the wait for the projections: in registers, the L2 cache, or shared
    memory (`hopper_decode_attention`)."""


@dataclass(frozen=True)
class HeadShape:
    """Heads of one layer; `rotary_dim` of a head's `head_dim` numbers are rotated."""

    kv_heads: int
    group: int
    """Query heads a KV head."""
    head_dim: int
    rotary_dim: int


@dataclass(frozen=True)
class DraftRows:
    """Which rows are whose in a step with drafts; all tensors int32 [R]. Rows of a request are neighbours, and a row
    whose position is not that of the first one plus the rows between them is a leaf.
    """

    owners: torch.Tensor
    """Each row's request: its row of the block table. -1: no request's."""
    firsts: torch.Tensor
    """The first row of the same request; -1: no request's."""

    def up_to(self, size: int) -> DraftRows:
        """The first `size` rows."""
        return DraftRows(self.owners[:size], self.firsts[:size])


class AttentionWorkspace:
    """Memory that all layers share; `first_units` [max_rows + 1] int32 is the plan of the current step.

    `dtype`: of the projections; `drafted`: of steps with `DraftRows`.
    """

    def __init__(
        self, shape: HeadShape, max_rows: int, dtype: torch.dtype, device: torch.device, *, drafted: bool = False
    ) -> None:
        group, dim = power_of_two(shape.group), power_of_two(shape.head_dim)
        self.processors = num_processors(device)
        self.queries = max(TILE_ROWS // group, 1) if drafted else 1
        self.few_rows = FEW_DRAFTED_ROWS if drafted else FEW_ROWS
        block = 2**13 // max(dim, 128)
        if drafted:
            self.few = Tiling(2 * block, 8, 1, "registers")
            self.many = Tiling(2**13 // max(dim, 64), 4, 2, "registers")
        else:
            self.few, self.many = Tiling(block, 4, 2, "registers"), Tiling(block, 2, 4, "L2")
        if is_hopper() and not drafted and shape.head_dim in SHARED_DIMS and group <= TILE_ROWS and dtype.itemsize == 2:
            self.many = Tiling(SHARED_BLOCK, 1, 8, "shared")
        parts = 2 * self.many.programs * self.processors
        self.first_units = torch.zeros(max_rows + 1, dtype=torch.int32, device=device)
        self.partial = torch.empty(parts * self.queries * group * (dim + 2), dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(max_rows * shape.kv_heads, dtype=torch.int32, device=device)
        self.padded_rows = power_of_two(max_rows)

    def tiling(self, rows: int) -> Tiling:
        """Of a step of so many rows."""
        return self.few if rows <= self.few_rows else self.many


def plan_decode_attention(
    positions: torch.Tensor, workspace: AttentionWorkspace, drafted: DraftRows | None = None
) -> None:
    """Count the units of each row; positions [B] int32 of the rows' tokens, -1 in rows without a request.

    The first row of a tile has the units of all of the tile.
    """
    _plan_kernel[(1,)](
        positions, None if drafted is None else drafted.firsts, workspace.first_units, positions.shape[0],
        QUERIES=workspace.queries, BLOCK=workspace.tiling(len(positions)).block, BATCH=workspace.padded_rows,
        num_warps=4, **dependent_launch(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch"])
def _plan_kernel(
    positions_ptr, firsts_ptr, first_units_ptr, batch,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.arange(0, BATCH)
    position = tl.load(positions_ptr + row, mask=row < batch, other=-1)
    has_units = position >= 0
    if firsts_ptr is not None:
        first = tl.load(firsts_ptr + row, mask=row < batch, other=-1)
        position = tl.load(positions_ptr + first, mask=first >= 0, other=-1)
        has_units = has_units & ((row - first) % QUERIES == 0)
    blocks = tl.where(has_units, tl.maximum(tl.cdiv(position, BLOCK), 1), 0)
    tl.store(first_units_ptr + 1 + row, tl.cumsum(blocks, 0), mask=row < batch)
    tl.store(first_units_ptr, 0)


@triton.jit
def rotation(cos_ptr, sin_ptr, position, d, ROTARY: tl.constexpr):
    """Cosine and sine for dimensions d of a head at a position, where they are rotated; else 1 and 0."""
    half: tl.constexpr = ROTARY // 2
    at = position * half + tl.where(d < half, d, d - half)
    return tl.load(cos_ptr + at, mask=d < ROTARY, other=1.0), tl.load(sin_ptr + at, mask=d < ROTARY, other=0.0)


@triton.jit
def rotated(start, d, angles, norm_ptr, eps, mask, DIM: tl.constexpr, ROTARY: tl.constexpr):
    """Dimensions d of the heads at `start`, normed where there are norms, and rotated by `angles`; float32."""
    half: tl.constexpr = ROTARY // 2
    partner = tl.where(d < half, d + half, tl.where(d < ROTARY, d - half, d))
    x = tl.load(start + d, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(start + partner, mask=mask, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
        x *= scale * tl.load(norm_ptr + d, mask=d < DIM, other=0.0).to(tl.float32)
        y *= scale * tl.load(norm_ptr + partner, mask=d < DIM, other=0.0).to(tl.float32)
    return x * angles[0] + y * tl.where(d < half, -angles[1], angles[1])


@triton.jit
def joined(highest, weight, acc, other_highest, other_weight, other_acc):
    """Two parts of an online softmax as one: highest scores, sums of weights and weighted sums of values."""
    higher = tl.maximum(highest, other_highest)
    shrink = tl.exp2(highest - higher)
    factor = tl.exp2(other_highest - higher)
    return higher, weight * shrink + other_weight * factor, acc * shrink[:, None] + other_acc * factor[:, None]
