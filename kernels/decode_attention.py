"""Attention of a decode step straight from the packed projections: rotation, cache write and attention in one kernel.

The work is cut and dealt out by `attention_plan`. A KV head's query heads are the rows of one tile, so that each key is
read once. Where several programs share a request's head, the one with its first tokens adds the others' parts to its
own (flash-decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The newest token's K and V are taken from
the projections, and go to the cache on the way.

A step that verifies drafts has several rows a request, one after the other. As many of them as fit share a tile, which
costs tensor cores nothing: their 16 rows are there anyway. K and V of its own step, of all rows up to its own, a tile
takes from the projections, for others write them to the cache in the same launch. Drafts may be trees: a request's
first rows are a chain, each at the position after the one before it, and further ones are leaves, which see themselves
and what lies before them in the chain. Each row has a slot of its own in the cache, in the order of the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrace.kernels.attention_plan import (
    MAX_STEP_ROWS,
    TILE_ROWS,
    AttentionWorkspace,
    DraftRows,
    HeadShape,
    joined,
    rotated,
    rotation,
)
from headrace.kernels.dealing import owner, share_of
from headrace.kernels.launch import dependent_launch, is_hopper, power_of_two
from headrace.kernels.rope import RopeTables

if is_hopper():
    from headrace.kernels.hopper_decode_attention import hopper_decode_attention

STAGES = 2
LINE_BYTES = 128
MERGE_REGISTERS = 64
"""A thread, for parts that are merged at once."""


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
    drafted: DraftRows | None = None,
    *,
    fresh: bool = False,
) -> None:
    """Rotate, write to the cache and attend, for one new token a row.

    qkv [B, (heads + 2 kv_heads) * head_dim] as projected; layer_pages [pages, 2, kv_heads, page_size, head_dim], of
    qkv's type or float8_e4m3fn; block_table int32 [B, width], positions int32 [B] (-1: the row is left alone); norms:
    weights [head_dim] of the RMS norms of Q and K (Qwen 3); out [B, heads * head_dim]. `drafted`: rows of one request
    see those before them; the workspace must have been made for that. `fresh`: the kernel ahead has written to these
    pages what this one reads.
    """
    tiling = workspace.tiling(len(positions))
    if tiling.first == "shared":
        hopper_decode_attention(
            qkv, layer_pages, block_table, positions, rope, norms, eps, out, shape, workspace, fresh
        )
        return
    line = LINE_BYTES // layer_pages.element_size()
    batch, group = positions.shape[0], power_of_two(shape.group)
    tile = max(TILE_ROWS, group)
    _attention_kernel[(tiling.programs * workspace.processors,)](
        qkv, layer_pages, block_table, positions, workspace.first_units,
        None if drafted is None else drafted.owners, None if drafted is None else drafted.firsts, rope.cos, rope.sin,
        norms[0] if norms else None, norms[1] if norms else None, out, workspace.partial, workspace.arrivals,
        batch, block_table.stride(0), shape.head_dim**-0.5, eps,
        KV_HEADS=shape.kv_heads, GROUP=shape.group, DIM=shape.head_dim, ROTARY=shape.rotary_dim,
        PAGE=layer_pages.shape[3], GROUP_PADDED=group, QUERIES=workspace.queries, TILE=tile,
        DIM_PADDED=power_of_two(shape.head_dim), BATCH=workspace.padded_rows, BLOCK=tiling.block,
        STEP_ROWS=MAX_STEP_ROWS, EARLY=tiling.first == "registers", STAGES=STAGES,
        MERGED=min(max(MERGE_REGISTERS * 32 * tiling.warps // (tile * power_of_two(shape.head_dim)), 1), 8),
        LINE=line,
        LINES=power_of_two(max(shape.head_dim // line, 1)), num_warps=tiling.warps,
        **dependent_launch(not fresh),
    )  # fmt: skip


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
def _attend(q, k, v, visible, highest, weight, acc):
    """One more tile of keys of an online softmax: its highest scores, sums of weights and weighted sums of values."""
    scores = tl.where(visible, tl.dot(q, k.T), float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1))
    p = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(highest - higher)
    return higher, weight * shrink + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, acc * shrink[:, None])


@triton.jit(do_not_specialize=["batch"])
def _attention_kernel(
    qkv_ptr, pages_ptr, table_ptr, positions_ptr, first_units_ptr, owners_ptr, firsts_ptr, cos_ptr, sin_ptr,
    q_norm_ptr, k_norm_ptr, out_ptr, partial_ptr, arrivals_ptr, batch, table_stride, scale, eps,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, PAGE: tl.constexpr,
    GROUP_PADDED: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr, DIM_PADDED: tl.constexpr,
    BATCH: tl.constexpr, BLOCK: tl.constexpr, STEP_ROWS: tl.constexpr, EARLY: tl.constexpr, STAGES: tl.constexpr,
    MERGED: tl.constexpr, LINE: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row_stride: tl.constexpr = (GROUP + 2) * KV_HEADS * DIM
    page_stride: tl.constexpr = 2 * KV_HEADS * PAGE * DIM
    values_at: tl.constexpr = KV_HEADS * PAGE * DIM
    stored: tl.constexpr = QUERIES * GROUP_PADDED
    part_size: tl.constexpr = stored * (DIM_PADDED + 2)
    pid = tl.program_id(0)
    rows = tl.arange(0, BATCH)
    first_units = tl.load(first_units_ptr + rows, mask=rows < batch, other=2**30 // KV_HEADS)
    total = tl.load(first_units_ptr + batch) * KV_HEADS
    programs = tl.minimum(tl.num_programs(0), total)
    program = tl.where(pid < programs, programs - 1 - pid, pid)  # the last one's share comes first, see the end
    unit, end, programs = share_of(program, tl.num_programs(0), total)
    # a tile's rows: the heads of its first query, those of its second one
    g = tl.arange(0, TILE)
    d = tl.arange(0, DIM_PADDED)[None, :]
    token = tl.arange(0, BLOCK)
    start = unit
    while unit < end:
        row, row_units, blocks, head, first = _place(unit, first_units, first_units_ptr, KV_HEADS)
        last = tl.minimum(blocks, first + end - unit)
        unit += last - first
        position = tl.load(positions_ptr + row)
        if firsts_ptr is None:
            table = table_ptr + row * table_stride
            num_cached = position
            in_tile = g < GROUP
            angles = rotation(cos_ptr, sin_ptr, position, d, ROTARY)
            q_at = qkv_ptr + row.to(tl.int64) * row_stride + (head * GROUP + g[:, None]) * DIM
            out = out_ptr + (row * KV_HEADS + head).to(tl.int64) * (GROUP * DIM) + g[:, None] * DIM
            # all rows of the tile hold the same new key and value
            key_row = row + g * 0
            is_cell = (g >= 0)[:, None] & (d < DIM)
            key_angles = angles
        else:
            table = table_ptr + tl.load(owners_ptr + row) * table_stride
            first_row = tl.load(firsts_ptr + row)
            num_cached = tl.load(positions_ptr + first_row)
            own_row = row + g // GROUP_PADDED
            in_tile = (g % GROUP_PADDED < GROUP) & (g < stored) & (own_row < batch)
            in_tile = in_tile & (tl.load(firsts_ptr + own_row, mask=in_tile, other=-1) == first_row)
            own_position = tl.load(positions_ptr + own_row, mask=in_tile, other=0)
            angles = rotation(cos_ptr, sin_ptr, own_position[:, None], d, ROTARY)
            own_head = (head * GROUP + g % GROUP_PADDED)[:, None] * DIM
            q_at = qkv_ptr + own_row[:, None].to(tl.int64) * row_stride + own_head
            out = out_ptr + own_row[:, None].to(tl.int64) * (KV_HEADS * GROUP * DIM) + own_head
            # keys of this step, see below
            offset = tl.arange(0, STEP_ROWS)
            key_row = first_row + offset
            is_key = (offset < row - first_row + QUERIES) & (key_row < batch)
            is_key = is_key & (tl.load(firsts_ptr + key_row, mask=is_key, other=-1) == first_row)
            key_at = num_cached + tl.where(is_key, offset, 0)
            key_position = tl.load(positions_ptr + key_row, mask=is_key, other=0)
            key_angles = rotation(cos_ptr, sin_ptr, key_position[:, None], d, ROTARY)
            key_page = tl.load(table + key_at // PAGE).to(tl.int64)
            is_cell = is_key[:, None] & (d < DIM)
        # what was loaded so far does not depend on the projections, nor do cached tokens
        first_at = first * BLOCK + token
        if EARLY:
            seen = first_at < num_cached
            early_page = tl.load(table + first_at // PAGE, mask=seen, other=0).to(tl.int64)
            early = pages_ptr + (early_page * page_stride + head * (PAGE * DIM) + first_at % PAGE * DIM)[:, None] + d
            early_k = tl.load(early, mask=seen[:, None] & (d < DIM), other=0.0)
            early_v = tl.load(early + values_at, mask=seen[:, None] & (d < DIM), other=0.0)
        elif PDL:
            if unit == start + last - first:  # the first ones come into the L2 cache before the wait
                page = tl.load(table + first_at // PAGE, mask=first_at < num_cached, other=0).to(tl.int64)
                lines = (tl.arange(0, LINES) * LINE)[None, :]
                cached = pages_ptr + (page * page_stride + head * (PAGE * DIM) + first_at % PAGE * DIM)[:, None] + lines
                _prefetch(cached)
                _prefetch(cached + values_at)
        if PDL:  # further units pass at once
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        is_query = in_tile[:, None] & (d < DIM)
        q = rotated(q_at, d, angles, q_norm_ptr, eps, is_query, DIM, ROTARY)
        q = (q * (scale * 1.4426950408889634)).to(qkv_ptr.dtype.element_ty)  # log2(e): exp2 is the faster one
        highest = tl.full((TILE,), -1e30, tl.float32)
        weight = tl.zeros((TILE,), tl.float32)
        acc = tl.zeros((TILE, DIM_PADDED), tl.float32)
        k_at = qkv_ptr + key_row[:, None].to(tl.int64) * row_stride + (GROUP * KV_HEADS + head) * DIM
        if EARLY:
            is_new = is_cell & (d < tl.where(last == blocks, DIM, 0))
            new_k = rotated(k_at, d, key_angles, k_norm_ptr, eps, is_new, DIM, ROTARY).to(pages_ptr.dtype.element_ty)
            new_v = tl.load(k_at + KV_HEADS * DIM + d, mask=is_new, other=0.0).to(tl.float32)
            new_v = new_v.to(pages_ptr.dtype.element_ty)  # by float32: Triton 3.6 garbles some bfloat16
            early_k, early_v = early_k.to(q.dtype), early_v.to(q.dtype)
            highest, weight, acc = _attend(q, early_k, early_v, seen[None, :], highest, weight, acc)
            first_left = first + 1
        else:
            first_left = first
        for block in tl.range(first_left, last, num_stages=STAGES):
            at = block * BLOCK + token
            seen = at < num_cached
            page = tl.load(table + at // PAGE, mask=seen, other=0).to(tl.int64)
            cached = pages_ptr + (page * page_stride + head * (PAGE * DIM) + at % PAGE * DIM)[:, None] + d
            k = tl.load(cached, mask=seen[:, None] & (d < DIM), other=0.0).to(q.dtype)
            v = tl.load(cached + values_at, mask=seen[:, None] & (d < DIM), other=0.0).to(q.dtype)
            highest, weight, acc = _attend(q, k, v, seen[None, :], highest, weight, acc)
        if last == blocks:
            if EARLY:
                k = new_k
                v = new_v
            else:
                k = rotated(k_at, d, key_angles, k_norm_ptr, eps, is_cell, DIM, ROTARY).to(pages_ptr.dtype.element_ty)
                v = tl.load(k_at + KV_HEADS * DIM + d, mask=is_cell, other=0.0).to(tl.float32)
                v = v.to(pages_ptr.dtype.element_ty)
            if firsts_ptr is None:
                page = tl.load(table + position // PAGE).to(tl.int64)
                cached = pages_ptr + page * page_stride + head * (PAGE * DIM) + position % PAGE * DIM + d
                cached += g[:, None] * 0
                tl.store(cached, k, mask=(d < DIM) & (g == 0)[:, None])
                tl.store(cached + values_at, v, mask=(d < DIM) & (g == 0)[:, None])
                score = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
                higher = tl.maximum(highest, score)
                p = tl.exp2(score - higher)
                shrink = tl.exp2(highest - higher)
                weight = weight * shrink + p
                acc = acc * shrink[:, None] + p[:, None] * v.to(tl.float32)
                highest = higher
            else:
                # keys of this step: those of the tile's own rows go to the cache
                own_slots = key_page * page_stride + head * (PAGE * DIM) + key_at % PAGE * DIM
                cached = pages_ptr + own_slots[:, None] + d
                is_own = is_cell & (key_row >= row)[:, None]
                tl.store(cached, k, mask=is_own)
                tl.store(cached + values_at, v, mask=is_own)
                until = tl.where(in_tile, own_position, 2**30)[:, None]  # other rows see something, too
                before = (key_position == key_at)[None, :] & (key_position[None, :] < until)
                visible = is_key[None, :] & (before | (key_row[None, :] == own_row[:, None]))
                highest, weight, acc = _attend(q, k.to(q.dtype), v.to(q.dtype), visible, highest, weight, acc)
        arrivals = arrivals_ptr + row * KV_HEADS + head
        if first > 0:  # the program that has the first units waits for the others, which have been started before it
            part = partial_ptr + program * part_size
            tl.store(part + g, highest, mask=in_tile, cache_modifier=".cg")
            tl.store(part + stored + g, weight, mask=in_tile, cache_modifier=".cg")
            tl.store(part + 2 * stored + g[:, None] * DIM_PADDED + d, acc, mask=is_query, cache_modifier=".cg")
            tl.debug_barrier()
            tl.atomic_add(arrivals, 1, sem="release", scope="gpu")
        else:
            others = 0
            if last < blocks:
                others = owner(row_units * KV_HEADS + (head + 1) * blocks - 1, programs, total) - program
                arrived = tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu")
                while arrived < others:
                    arrived = tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu")
                tl.debug_barrier()
                tl.store(arrivals, 0)
            # apart from this program's own part, which lies otherwise across warps; several are on their way at once
            top = tl.full((TILE,), -1e30, tl.float32)
            total_weight = tl.zeros((TILE,), tl.float32)
            total_acc = tl.zeros((TILE, DIM_PADDED), tl.float32)
            for begin in range(1, others + 1, MERGED):
                asked = ()
                for index in tl.static_range(MERGED):
                    part = partial_ptr + (program + begin + index) * part_size
                    there = in_tile & (begin + index + g * 0 <= others)
                    is_there = there[:, None] & (d < DIM)
                    part_highest = tl.load(part + g, mask=there, other=-1e30, cache_modifier=".cg")
                    part_weight = tl.load(part + stored + g, mask=there, other=0.0, cache_modifier=".cg")
                    acc_at = part + 2 * stored + g[:, None] * DIM_PADDED + d
                    part_acc = tl.load(acc_at, mask=is_there, other=0.0, cache_modifier=".cg")
                    asked = asked + ((part_highest, part_weight, part_acc),)  # type: ignore[assignment] # noqa: RUF005
                for index in tl.static_range(MERGED):
                    top, total_weight, total_acc = joined(top, total_weight, total_acc, *asked[index])
            highest, weight, acc = joined(highest, weight, acc, top, total_weight, total_acc)
            tl.store(out + d, (acc / weight[:, None]).to(out_ptr.dtype.element_ty), mask=is_query)
    if PDL:  # a program without units: what is older than the kernel ahead must be complete when this one is
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
