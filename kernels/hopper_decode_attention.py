"""Attention of a decode step on a Hopper GPU, in Gluon: plain rows, heads of 64 or 128. See `decode_attention`.

Each program is one warp with a ring of pages of K and V in shared memory, several programs to a processor. A ring is
filled while the projections ahead are still at work, since cached tokens do not depend on them, and stays full across
the borders of heads and requests. One warp needs no barrier of threads, and its scores become weights of values in the
registers in which they are.

8-bit K and V travel as pairs of neighbouring dimensions, so that 16-bit loads transpose them for the tensor cores. In
registers a pair becomes two float16 numbers, and a tile has the even dimensions first, then the odd ones: queries and
outputs follow that order.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import debug_barrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.attention_plan import TILE_ROWS, AttentionWorkspace, HeadShape, rotated, rotation
from headrace.kernels.dealing import owner, share_of
from headrace.kernels.hopper import async_load
from headrace.kernels.launch import power_of_two
from headrace.kernels.rope import RopeTables

STAGES = 3

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def hopper_decode_attention(
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
    fresh: bool,
) -> None:
    """See `fused_decode_attention`; without drafts."""
    packed = layer_pages.element_size() == 1
    stored = power_of_two(shape.group)
    units = layer_pages.view(torch.int16) if packed else layer_pages
    units = units.view(-1, units.shape[-1])
    tiling = workspace.tiling(len(positions))
    block = [tiling.block, units.shape[1]]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.int16 if packed else _DTYPES[units.dtype])
    _ring_kernel[(tiling.programs * workspace.processors,)](
        TensorDescriptor.from_tensor(units, block, layout), qkv, layer_pages, block_table, positions,
        workspace.first_units, rope.cos, rope.sin, norms[0] if norms else None, norms[1] if norms else None, out,
        workspace.partial, workspace.arrivals, positions.shape[0], block_table.stride(0), shape.head_dim**-0.5, eps,
        KV_HEADS=shape.kv_heads, GROUP=shape.group, ROTARY=shape.rotary_dim, PAGE=layer_pages.shape[3],
        BATCH=workspace.padded_rows, TILE=TILE_ROWS, STORED=stored, MERGED=max(16 // stored, 1), STAGES=STAGES,
        num_warps=tiling.warps,
        launch_pdl=not fresh,
    )  # fmt: skip


@gluon.constexpr_function
def _merge_layout(dim):
    """Of [parts, query heads, dim]."""
    lanes = min(dim // 4, 32)
    return gl.BlockedLayout([1, 1, 4], [1, 32 // lanes, lanes], [1, 1, 1], [2, 1, 0])


@gluon.jit
def _floats(pairs, axis: gl.constexpr, layout: gl.constexpr):
    """Pairs of 8-bit numbers as float16, the first ones of all pairs along `axis`, then the second ones."""
    even, odd = gl.inline_asm_elementwise(
        """{
        .reg .b32 lower, upper;
        .reg .b16 first, second;
        prmt.b32 lower, $2, 0, 0x4420;
        prmt.b32 upper, $2, 0, 0x4431;
        cvt.u16.u32 first, lower;
        cvt.u16.u32 second, upper;
        cvt.rn.f16x2.e4m3x2 $0, first;
        cvt.rn.f16x2.e4m3x2 $1, second;
        }""",
        "=r,=r,r", [pairs], dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
    )  # fmt: skip
    both = gl.join(even, odd)
    ROWS: gl.constexpr = pairs.shape[0]
    COLUMNS: gl.constexpr = pairs.shape[1]
    if axis == 0:
        both = both.permute((2, 0, 1)).reshape([2 * ROWS, COLUMNS])
    else:
        both = both.permute((0, 2, 1)).reshape([ROWS, 2 * COLUMNS])
    return gl.convert_layout(both, layout)


@gluon.jit
def _ask(cached, page, head, block, slot, keys, values, bars, KV_HEADS: gl.constexpr, PAGE: gl.constexpr):
    """Have a block of a head's cached tokens loaded."""
    TOKENS: gl.constexpr = cached.block_type.shape[0]
    bar = bars.index(slot)
    mbarrier.expect(bar, 2 * cached.block_type.nbytes)
    first = (page * (2 * KV_HEADS) + head) * PAGE + block * TOKENS % PAGE
    async_load(cached, [first, 0], bar, keys.index(slot))
    async_load(cached, [first + KV_HEADS * PAGE, 0], bar, values.index(slot))


@gluon.jit
def _find(unit, first_units, first_units_ptr):
    """A unit's row, where that row's units start, how many it has, and which of them the unit is."""
    row = gl.sum((first_units <= unit).to(gl.int32), 0) - 1
    row_units = gl.load(first_units_ptr + row)
    return row, row_units, gl.load(first_units_ptr + row + 1) - row_units, unit - row_units


@gluon.jit
def _advance(unit, row, block, blocks, end, first_units, first_units_ptr):
    """The unit after this one, and where it is."""
    unit += 1
    block += 1
    if (block == blocks) & (unit < end):
        row, _, blocks, block = _find(unit, first_units, first_units_ptr)
    return unit, row, block, blocks


@gluon.jit(do_not_specialize=["batch"])
def _ring_kernel(
    cached, qkv_ptr, pages_ptr, table_ptr, positions_ptr, first_units_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr,
    out_ptr, partial_ptr, arrivals_ptr, batch, table_stride, scale, eps,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, ROTARY: gl.constexpr, PAGE: gl.constexpr, BATCH: gl.constexpr,
    TILE: gl.constexpr, STORED: gl.constexpr, MERGED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = cached.block_type.shape[0]
    UNITS: gl.constexpr = cached.block_type.shape[1]
    PACKED: gl.constexpr = cached.dtype == gl.int16
    DIM: gl.constexpr = UNITS * 2 if PACKED else UNITS
    COMPUTED: gl.constexpr = gl.float16 if PACKED else qkv_ptr.dtype.element_ty
    row_stride: gl.constexpr = (GROUP + 2) * KV_HEADS * DIM
    values_at: gl.constexpr = KV_HEADS * PAGE * DIM
    part_size: gl.constexpr = STORED * (DIM + 2)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    search: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    merge: gl.constexpr = _merge_layout(DIM)
    keys = gl.allocate_shared_memory(cached.dtype, [STAGES, TOKENS, UNITS], cached.layout)
    values = gl.allocate_shared_memory(cached.dtype, [STAGES, TOKENS, UNITS], cached.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(bars.index(slot), count=1)

    # programs of all heads read the same pages at the same time
    pid = gl.program_id(0)
    head = pid % KV_HEADS
    rows = gl.arange(0, BATCH, layout=search)
    first_units = gl.load(first_units_ptr + rows, mask=rows < batch, other=2**30)
    total = gl.load(first_units_ptr + batch)
    unit, end, programs = share_of(pid // KV_HEADS, gl.num_programs(0) // KV_HEADS, total)

    # the head of the ring, which runs ahead of the products, and the page that it asks for next
    ahead = unit
    ahead_row, _, ahead_blocks, ahead_block = _find(unit, first_units, first_units_ptr)
    page = gl.load(table_ptr + ahead_row * table_stride + ahead_block * TOKENS // PAGE, mask=ahead < end)
    asked = ()
    for _stage in gl.static_range(STAGES - 1):
        asked = asked + ((ahead, page, ahead_block),)  # type: ignore[assignment] # noqa: RUF005
        ahead, ahead_row, ahead_block, ahead_blocks = _advance(
            ahead, ahead_row, ahead_block, ahead_blocks, end, first_units, first_units_ptr
        )
        page = gl.load(table_ptr + ahead_row * table_stride + ahead_block * TOKENS // PAGE, mask=ahead < end)
    for slot in gl.static_range(STAGES - 1):
        if asked[slot][0] < end:
            _ask(cached, asked[slot][1], head, asked[slot][2], slot, keys, values, bars, KV_HEADS, PAGE)

    # one row for each query head
    g = gl.arange(0, TILE, layout=gl.SliceLayout(1, mma))
    j = gl.arange(0, DIM, layout=gl.SliceLayout(0, mma))
    d = (j % UNITS * 2 + j // UNITS if PACKED else j)[None, :]
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, mma))
    is_query = (g < GROUP)[:, None] & (d < DIM)
    slot = 0
    parity = 0
    while unit < end:
        row, row_units, blocks, first = _find(unit, first_units, first_units_ptr)
        last = gl.minimum(blocks, first + end - unit)
        unit += last - first
        position = gl.load(positions_ptr + row)
        angles = rotation(cos_ptr, sin_ptr, position, d, ROTARY)
        gdc_wait()  # for the projections: further units pass at once
        gdc_launch_dependents()
        queries = qkv_ptr + row.to(gl.int64) * row_stride
        q = rotated(queries + (head * GROUP + g[:, None]) * DIM, d, angles, q_norm_ptr, eps, is_query, DIM, ROTARY)
        q = (q * (scale * 1.4426950408889634)).to(COMPUTED)  # log2(e): exp2 is the faster one
        q_left = gl.convert_layout(q, left)
        highest = gl.full((TILE,), -1e30, gl.float32, gl.SliceLayout(1, mma))
        weight = gl.zeros((TILE,), gl.float32, gl.SliceLayout(1, mma))
        acc = gl.zeros((TILE, DIM), gl.float32, mma)
        for block in range(first, last):
            mbarrier.wait(bars.index(slot), parity)
            k = keys.index(slot).permute((1, 0)).load(right)
            v = values.index(slot).load(right)
            # the slot before this one is in nobody's way
            if ahead < end:
                free = gl.where(slot == 0, STAGES - 1, slot - 1)
                _ask(cached, page, head, ahead_block, free, keys, values, bars, KV_HEADS, PAGE)
                ahead, ahead_row, ahead_block, ahead_blocks = _advance(
                    ahead, ahead_row, ahead_block, ahead_blocks, end, first_units, first_units_ptr
                )
                page = gl.load(table_ptr + ahead_row * table_stride + ahead_block * TOKENS // PAGE, mask=ahead < end)
            slot += 1
            parity = gl.where(slot == STAGES, parity ^ 1, parity)
            slot = gl.where(slot == STAGES, 0, slot)
            if PACKED:
                k = _floats(k, 0, right)
                v = _floats(v, 1, right)
            scores = mma_v2(q_left, k, gl.zeros((TILE, TOKENS), gl.float32, mma))
            scores = gl.where((block * TOKENS + token < position)[None, :], scores, float("-inf"))
            higher = gl.maximum(highest, gl.max(scores, 1))
            p = gl.exp2(scores - higher[:, None])
            shrink = gl.exp2(highest - higher)
            weight = weight * shrink + gl.sum(p, 1)
            acc = mma_v2(gl.convert_layout(p.to(COMPUTED), left), v, acc * shrink[:, None])
            highest = higher
        if last == blocks:  # the newest token
            k_at = queries + (GROUP * KV_HEADS + head) * DIM
            k_new = rotated(k_at, d, angles, k_norm_ptr, eps, d < DIM, DIM, ROTARY).to(pages_ptr.dtype.element_ty)
            v_new = gl.load(k_at + KV_HEADS * DIM + d).to(gl.float32).to(pages_ptr.dtype.element_ty)
            own_page = gl.load(table_ptr + row * table_stride + position // PAGE).to(gl.int64)
            slot_at = pages_ptr + own_page * (2 * values_at) + head * (PAGE * DIM) + position % PAGE * DIM + d
            gl.store(slot_at, k_new)
            gl.store(slot_at + values_at, v_new)
            score = gl.sum(q.to(gl.float32) * k_new.to(gl.float32), 1)
            higher = gl.maximum(highest, score)
            p = gl.exp2(score - higher)
            shrink = gl.exp2(highest - higher)
            weight = weight * shrink + p
            acc = acc * shrink[:, None] + p[:, None] * v_new.to(gl.float32)
            highest = higher
        out = out_ptr + (row * KV_HEADS + head).to(gl.int64) * (GROUP * DIM)
        if last - first == blocks:
            gl.store(out + g[:, None] * DIM + d, (acc / weight[:, None]).to(out_ptr.dtype.element_ty), mask=is_query)
        else:
            first_owner = owner(row_units, programs, total)
            parts = owner(row_units + blocks - 1, programs, total) - first_owner + 1
            # a program may have the end of one head's units and the start of another's: two places
            part = partial_ptr + (pid * 2 + gl.where(first == 0, 1, 0)) * part_size
            gl.store(part + g, highest, mask=g < GROUP, cache_modifier=".cg")
            gl.store(part + STORED + g, weight, mask=g < GROUP, cache_modifier=".cg")
            gl.store(part + 2 * STORED + g[:, None] * DIM + d, acc, mask=is_query, cache_modifier=".cg")
            debug_barrier()
            arrived = gl.atomic_add(arrivals_ptr + row * KV_HEADS + head, 1, sem="acq_rel", scope="gpu")
            if arrived == parts - 1:
                gl.store(arrivals_ptr + row * KV_HEADS + head, 0)
                gs = gl.arange(0, STORED, layout=gl.SliceLayout(0, gl.SliceLayout(2, merge)))
                i = gl.arange(0, MERGED, layout=gl.SliceLayout(1, gl.SliceLayout(2, merge)))
                ds = gl.arange(0, DIM, layout=gl.SliceLayout(0, gl.SliceLayout(1, merge)))
                top = gl.full((STORED,), -1e30, gl.float32, gl.SliceLayout(0, gl.SliceLayout(2, merge)))
                denominator = gl.zeros((STORED,), gl.float32, gl.SliceLayout(0, gl.SliceLayout(2, merge)))
                numerator = gl.zeros((STORED, DIM), gl.float32, gl.SliceLayout(0, merge))
                for start in range(0, parts, MERGED):
                    program = (first_owner + start + i) * KV_HEADS + head
                    at = partial_ptr + (program * 2 + gl.where(start + i == 0, 1, 0)) * part_size
                    there = (start + i < parts)[:, None] & (gs < GROUP)[None, :]
                    cells = at[:, None] + gs[None, :]
                    part_top = gl.load(cells, mask=there, other=-1e30, cache_modifier=".cg")
                    part_weight = gl.load(cells + STORED, mask=there, other=0.0, cache_modifier=".cg")
                    part_acc = gl.load(
                        (at[:, None] + 2 * STORED + gs[None, :] * DIM)[:, :, None] + ds[None, None, :],
                        mask=there[:, :, None], other=0.0, cache_modifier=".cg",
                    )  # fmt: skip
                    new_top = gl.maximum(top, gl.max(part_top, 0))
                    factor = gl.exp2(part_top - new_top[None, :])
                    shrink = gl.exp2(top - new_top)
                    denominator = denominator * shrink + gl.sum(factor * part_weight, 0)
                    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, gl.SliceLayout(0, merge)))
                    numerator = numerator * shrink[:, None] + gl.sum(factor[:, :, None] * part_acc, 0)
                    top = new_top
                denominator = gl.where(denominator > 0, denominator, 1.0)
                denominator = gl.convert_layout(denominator, gl.SliceLayout(1, gl.SliceLayout(0, merge)))
                merged = (numerator / denominator[:, None]).to(out_ptr.dtype.element_ty)
                gr = gl.arange(0, STORED, layout=gl.SliceLayout(1, gl.SliceLayout(0, merge)))
                dr = gl.arange(0, DIM, layout=gl.SliceLayout(0, gl.SliceLayout(0, merge)))
                gl.store(out + gr[:, None] * DIM + dr[None, :], merged, mask=(gr < GROUP)[:, None])
    gdc_wait()  # a program without units: what is older than the kernel ahead must be complete when this one is
    gdc_launch_dependents()
