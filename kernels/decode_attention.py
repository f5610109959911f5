"""Attention of a decode step straight from the packed projections: rotation, cache write and attention in one kernel.

The work is cut into units of `BLOCK` cached tokens of one request and one KV head, and the units are dealt out evenly
to the programs, long and short requests alike (stream-K, as in `decode_linear`). A KV head's query heads are the rows
of one tile, so that each key is read once. Where several programs share a request's head, the last to arrive merges
their parts (flash-decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The newest token's K and V are
taken from the projections, and go to the cache on the way.

`plan_decode_attention` runs once a step, before all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headrace.kernels.dealing import owner, share_of
from headrace.kernels.launch import dependent_launch, num_processors, power_of_two
from headrace.kernels.rope import RopeTables

PROGRAMS_A_PROCESSOR = 4
WARPS, STAGES = 2, 2
MERGED_AT_ONCE = 8
LINE_BYTES = 128


@dataclass(frozen=True)
class HeadShape:
    """Heads of one layer; `rotary_dim` of a head's `head_dim` numbers are rotated."""

    kv_heads: int
    group: int
    """Query heads a KV head."""
    head_dim: int
    rotary_dim: int


class AttentionWorkspace:
    """Memory that all layers share; `first_units` [max_batch + 1] int32 is the plan of the current step."""

    def __init__(self, shape: HeadShape, max_batch: int, device: torch.device) -> None:
        programs = PROGRAMS_A_PROCESSOR * num_processors(device)
        cell = power_of_two(shape.group) * (power_of_two(shape.head_dim) + 2)
        self.first_units = torch.zeros(max_batch + 1, dtype=torch.int32, device=device)
        self.partial = torch.empty(programs * 2 * cell, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(max_batch * shape.kv_heads, dtype=torch.int32, device=device)
        self.padded_batch = power_of_two(max_batch)
        self.block = 64 if shape.head_dim <= 128 else 32
        self.programs = programs


def plan_decode_attention(positions: torch.Tensor, workspace: AttentionWorkspace) -> None:
    """Count the units of each row; positions [B] int32 of the newest tokens, -1 in rows without a request."""
    batch = positions.shape[0]
    _plan_kernel[(1,)](
        positions, workspace.first_units, batch, BLOCK=workspace.block, BATCH=workspace.padded_batch, num_warps=4,
        **dependent_launch(),
    )  # fmt: skip


def fused_decode_attention(
    qkv: torch.Tensor,
    layer_pages: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    rope: RopeTables,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    out: torch.Tensor,
    shape: HeadShape,
    workspace: AttentionWorkspace,
) -> None:
    """Rotate, write to the cache and attend, for one new token a row.

    qkv [B, (heads + 2 kv_heads) * head_dim] as projected; layer_pages [pages, 2, kv_heads, page_size, head_dim], of
    qkv's type or float8_e4m3fn; block_table int32 [B, width], positions int32 [B] (-1: the row is left alone); norms:
    weights [head_dim] of the RMS norms of Q and K (Qwen 3); out [B, heads * head_dim].
    """
    line = LINE_BYTES // layer_pages.element_size()
    batch, group_rows = positions.shape[0], max(16, power_of_two(shape.group))  # tensor cores take 16 rows
    _attention_kernel[(workspace.programs,)](
        qkv, layer_pages, block_table, positions, workspace.first_units, rope.cos, rope.sin,
        norms[0] if norms else None, norms[1] if norms else None, out, workspace.partial, workspace.arrivals,
        batch, block_table.stride(0), shape.head_dim**-0.5, eps,
        KV_HEADS=shape.kv_heads, GROUP=shape.group, DIM=shape.head_dim, ROTARY=shape.rotary_dim,
        PAGE=layer_pages.shape[3], GROUP_ROWS=group_rows, GROUP_STORED=power_of_two(shape.group),
        DIM_PADDED=power_of_two(shape.head_dim), BATCH=workspace.padded_batch, BLOCK=workspace.block,
        STAGES=STAGES, MERGED=MERGED_AT_ONCE, LINE=line, LINES=power_of_two(max(shape.head_dim // line, 1)),
        num_warps=WARPS, **dependent_launch(),
    )  # fmt: skip


def fused_decode_attention_reference(
    qkv: torch.Tensor,
    layer_pages: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    rope: RopeTables,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    out: torch.Tensor,
    shape: HeadShape,
) -> None:
    """The same in plain torch, request by request, in float64."""
    heads, kv_heads, page_size = shape.kv_heads * shape.group, shape.kv_heads, layer_pages.shape[3]
    for row, position in enumerate(positions.tolist()):
        if position < 0:
            continue
        queries, key, value = qkv[row].double().view(-1, shape.head_dim).split((heads, kv_heads, kv_heads))
        if norms is not None:
            queries, key = (
                x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.double()
                for x, norm in zip((queries, key), norms, strict=True)
            )
        queries, key = (_rotate(x, rope, position, shape.rotary_dim) for x in (queries, key))
        page, offset = int(block_table[row, position // page_size]), position % page_size
        layer_pages[page, 0, :, offset] = key.to(layer_pages.dtype)
        layer_pages[page, 1, :, offset] = value.to(layer_pages.dtype)
        pages = layer_pages[block_table[row, : position // page_size + 1].long()].double()
        keys, values = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : position + 1]
        scores = queries.view(kv_heads, shape.group, -1) @ keys.transpose(1, 2) * shape.head_dim**-0.5
        out[row] = (scores.softmax(-1) @ values).flatten()


def _rotate(x: torch.Tensor, rope: RopeTables, position: int, rotary_dim: int) -> torch.Tensor:
    cos, sin = rope.cos[position].double(), rope.sin[position].double()
    first, second, rest = x.split((rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim), -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


@triton.jit(do_not_specialize=["batch"])
def _plan_kernel(positions_ptr, first_units_ptr, batch, BLOCK: tl.constexpr, BATCH: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.arange(0, BATCH)
    position = tl.load(positions_ptr + row, mask=row < batch, other=-1)
    blocks = tl.where(position >= 0, tl.maximum(tl.cdiv(position, BLOCK), 1), 0)
    tl.store(first_units_ptr + 1 + row, tl.cumsum(blocks, 0), mask=row < batch)
    tl.store(first_units_ptr, 0)


@triton.jit
def _prefetch(lines):
    """Bring the line at each address into the L2 cache; prefetches past an allocation's end do nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _place(unit, first_units, first_units_ptr, KV_HEADS: tl.constexpr):
    """A unit's row, where that row's units start, its blocks a head, and which KV head and block of it the unit is."""
    row = tl.sum((first_units * KV_HEADS <= unit).to(tl.int32), 0) - 1
    row_units = tl.load(first_units_ptr + row)
    blocks = tl.load(first_units_ptr + row + 1) - row_units
    head = (unit - row_units * KV_HEADS) // blocks
    return row, row_units, blocks, head, unit - row_units * KV_HEADS - head * blocks


@triton.jit
def _rotated(start, d, cos, sin, norm_ptr, eps, mask, DIM: tl.constexpr, ROTARY: tl.constexpr):
    half: tl.constexpr = ROTARY // 2
    partner = tl.where(d < half, d + half, tl.where(d < ROTARY, d - half, d))
    x = tl.load(start + d, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(start + partner, mask=mask, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
        x *= scale * tl.load(norm_ptr + d, mask=d < DIM, other=0.0).to(tl.float32)
        y *= scale * tl.load(norm_ptr + partner, mask=d < DIM, other=0.0).to(tl.float32)
    return x * cos + y * tl.where(d < half, -sin, sin)


@triton.jit(do_not_specialize=["batch"])
def _attention_kernel(
    qkv_ptr, pages_ptr, table_ptr, positions_ptr, first_units_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr,
    out_ptr, partial_ptr, arrivals_ptr, batch, table_stride, scale, eps,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, PAGE: tl.constexpr,
    GROUP_ROWS: tl.constexpr, GROUP_STORED: tl.constexpr, DIM_PADDED: tl.constexpr, BATCH: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, MERGED: tl.constexpr, LINE: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row_stride: tl.constexpr = (GROUP + 2) * KV_HEADS * DIM
    page_stride: tl.constexpr = 2 * KV_HEADS * PAGE * DIM
    values_at: tl.constexpr = KV_HEADS * PAGE * DIM
    part_size: tl.constexpr = GROUP_STORED * (DIM_PADDED + 2)
    pid = tl.program_id(0)
    rows = tl.arange(0, BATCH)
    first_units = tl.load(first_units_ptr + rows, mask=rows < batch, other=2**30 // KV_HEADS)
    total = tl.load(first_units_ptr + batch) * KV_HEADS
    unit, end, programs = share_of(pid, total)
    g = tl.arange(0, GROUP_ROWS)
    d = tl.arange(0, DIM_PADDED)[None, :]
    token = tl.arange(0, BLOCK)
    if PDL:
        if unit < end:
            # cached tokens don't depend on the projections: the first ones come into the L2 cache before the wait
            row, _, _, head, block = _place(unit, first_units, first_units_ptr, KV_HEADS)
            at = block * BLOCK + token
            page = tl.load(table_ptr + row * table_stride + at // PAGE).to(tl.int64)
            lines = (tl.arange(0, LINES) * LINE)[None, :]
            cached = pages_ptr + (page * page_stride + head * (PAGE * DIM) + at % PAGE * DIM)[:, None] + lines
            _prefetch(cached)
            _prefetch(cached + values_at)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    while unit < end:
        row, row_units, blocks, head, first = _place(unit, first_units, first_units_ptr, KV_HEADS)
        last = tl.minimum(blocks, first + end - unit)
        unit += last - first
        position = tl.load(positions_ptr + row)
        angle = tl.where(d < ROTARY // 2, d, d - ROTARY // 2)
        cos = tl.load(cos_ptr + position * (ROTARY // 2) + angle, mask=d < ROTARY, other=1.0)
        sin = tl.load(sin_ptr + position * (ROTARY // 2) + angle, mask=d < ROTARY, other=0.0)
        qkv = qkv_ptr + row.to(tl.int64) * row_stride
        is_query = (g < GROUP)[:, None] & (d < DIM)
        q = _rotated(qkv + (head * GROUP + g[:, None]) * DIM, d, cos, sin, q_norm_ptr, eps, is_query, DIM, ROTARY)
        q = (q * (scale * 1.4426950408889634)).to(qkv_ptr.dtype.element_ty)  # log2(e): exp2 is the faster one
        highest = tl.full((GROUP_ROWS,), -1e30, tl.float32)
        weight = tl.zeros((GROUP_ROWS,), tl.float32)
        acc = tl.zeros((GROUP_ROWS, DIM_PADDED), tl.float32)
        for block in tl.range(first, last, num_stages=STAGES):
            at = block * BLOCK + token
            page = tl.load(table_ptr + row * table_stride + at // PAGE).to(tl.int64)
            cached = pages_ptr + (page * page_stride + head * (PAGE * DIM) + at % PAGE * DIM)[:, None] + d
            k = tl.load(cached, mask=d < DIM, other=0.0).to(q.dtype)
            v = tl.load(cached + values_at, mask=d < DIM, other=0.0).to(q.dtype)
            scores = tl.where((at < position)[None, :], tl.dot(q, k.T), float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            p = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(highest - higher)
            weight = weight * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
            highest = higher
        if last == blocks:
            # all rows of the tile hold the same key and value
            k_at = qkv + (GROUP * KV_HEADS + head) * DIM + g[:, None] * 0
            k = _rotated(k_at, d, cos, sin, k_norm_ptr, eps, d < DIM, DIM, ROTARY)
            k = k.to(pages_ptr.dtype.element_ty)
            v = tl.load(k_at + KV_HEADS * DIM + d, mask=d < DIM, other=0.0).to(pages_ptr.dtype.element_ty)
            page = tl.load(table_ptr + row * table_stride + position // PAGE).to(tl.int64)
            cached = pages_ptr + page * page_stride + head * (PAGE * DIM) + position % PAGE * DIM + d + g[:, None] * 0
            tl.store(cached, k, mask=(d < DIM) & (g == 0)[:, None])
            tl.store(cached + values_at, v, mask=(d < DIM) & (g == 0)[:, None])
            score = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
            higher = tl.maximum(highest, score)
            p = tl.exp2(score - higher)
            shrink = tl.exp2(highest - higher)
            weight = weight * shrink + p
            acc = acc * shrink[:, None] + p[:, None] * v.to(tl.float32)
            highest = higher
        out = out_ptr + (row * KV_HEADS + head).to(tl.int64) * (GROUP * DIM)
        if last - first == blocks:
            tl.store(out + g[:, None] * DIM + d, (acc / weight[:, None]).to(out_ptr.dtype.element_ty), mask=is_query)
        else:
            first_owner = owner(row_units * KV_HEADS + head * blocks, programs, total)
            parts = owner(row_units * KV_HEADS + (head + 1) * blocks - 1, programs, total) - first_owner + 1
            # a program may have the end of one head's units and the start of another's: two places
            part = partial_ptr + (pid * 2 + tl.where(first == 0, 1, 0)) * part_size
            tl.store(part + g, highest, mask=g < GROUP, cache_modifier=".cg")
            tl.store(part + GROUP_STORED + g, weight, mask=g < GROUP, cache_modifier=".cg")
            tl.store(part + 2 * GROUP_STORED + g[:, None] * DIM_PADDED + d, acc, mask=is_query, cache_modifier=".cg")
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + row * KV_HEADS + head, 1, sem="acq_rel", scope="gpu")
            if arrived == parts - 1:
                tl.store(arrivals_ptr + row * KV_HEADS + head, 0)
                gs = tl.arange(0, GROUP_STORED)
                top = tl.full((GROUP_STORED,), -1e30, tl.float32)
                denominator = tl.zeros((GROUP_STORED,), tl.float32)
                numerator = tl.zeros((GROUP_STORED, DIM_PADDED), tl.float32)
                for start in range(0, parts, MERGED):
                    i = start + tl.arange(0, MERGED)
                    place = partial_ptr + ((first_owner + i) * 2 + tl.where(i == 0, 1, 0)) * part_size
                    there = (i < parts)[:, None] & (gs < GROUP)[None, :]
                    cells = place[:, None] + gs[None, :]
                    part_top = tl.load(cells, mask=there, other=-1e30, cache_modifier=".cg")
                    part_weight = tl.load(cells + GROUP_STORED, mask=there, other=0.0, cache_modifier=".cg")
                    part_acc = tl.load(
                        (place[:, None] + 2 * GROUP_STORED + gs[None, :] * DIM_PADDED)[:, :, None] + d[None, :, :],
                        mask=there[:, :, None] & (d < DIM)[None, :, :], other=0.0, cache_modifier=".cg",
                    )  # fmt: skip
                    new_top = tl.maximum(top, tl.max(part_top, 0))
                    factor = tl.exp2(part_top - new_top[None, :])
                    shrink = tl.exp2(top - new_top)
                    denominator = denominator * shrink + tl.sum(factor * part_weight, 0)
                    numerator = numerator * shrink[:, None] + tl.sum(factor[:, :, None] * part_acc, 0)
                    top = new_top
                merged = numerator / tl.where(denominator > 0, denominator, 1.0)[:, None]
                is_stored = (gs < GROUP)[:, None] & (d < DIM)
                tl.store(out + gs[:, None] * DIM + d, merged.to(out_ptr.dtype.element_ty), mask=is_stored)
