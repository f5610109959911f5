"""Causal attention of whole prompts on a Hopper GPU, in Gluon, as in FlashAttention-3 (arXiv:2407.08608).

One warp loads keys and values; two groups of four warps compute, each half of a tile's rows, so that one's exponentials
meet the other's products. Within a group, too: the scores of a block are asked for first, then the product of the block
before with its values, and while the tensor cores are busy with that one, the softmax of the new scores is computed.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headrace.kernels.hopper import async_load
from headrace.kernels.launch import power_of_two

HALF_ROWS = 64
"""A tile has twice as many rows: tokens times query heads a KV head."""
BLOCK_N = 128
"""Keys at once."""
STAGES = 2
"""Blocks of keys, and of values, that are there or on their way."""
COMPUTING_WARPS, LOADING_WARPS = 4, 1
COMPUTING_REGISTERS, LOADING_REGISTERS = 240, 24
REGISTERS = 168
"""A thread, on average: all that a processor has for three groups of four warps."""
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def can_attend(queries: torch.Tensor, kv_heads: int) -> bool:
    """Whether the kernel is made for such queries [T, heads, head_dim]."""
    _, heads, dim = queries.shape
    group = heads // kv_heads
    return queries.dtype in DTYPES and dim in (64, 128) and group <= HALF_ROWS and group == power_of_two(group)


def hopper_attention(
    queries: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    tiles: torch.Tensor,
    query_starts: torch.Tensor,
    kv_heads: int,
    scale: float,
) -> None:
    """See `attend_packed`; `tiles` of 128 rows and `query_starts` as in a `TilePlan`; `scale` is for exponents of 2."""
    _, heads, dim = queries.shape
    group, dtype = heads // kv_heads, DTYPES[queries.dtype]
    query_block, kv_block = [HALF_ROWS // group, group, dim], [BLOCK_N, dim]
    query_layout = gl.NVMMASharedLayout.get_default_for(query_block, dtype)
    _attention_kernel[(len(tiles) * kv_heads,)](
        TensorDescriptor(queries, list(queries.shape), list(queries.stride()), query_block, query_layout),
        TensorDescriptor.from_tensor(qkv, kv_block, gl.NVMMASharedLayout.get_default_for(kv_block, dtype)),
        out, tiles, query_starts, scale, KV_HEADS=kv_heads, GROUP=group, STAGES=STAGES,
        LOADING_WARPS=LOADING_WARPS, COMPUTING_REGISTERS=COMPUTING_REGISTERS, LOADING_REGISTERS=LOADING_REGISTERS,
        num_warps=COMPUTING_WARPS, maxnreg=REGISTERS,
    )  # fmt: skip


@gluon.jit
def _softmax(scores, highest, weight, scale, last, block, MASKED: gl.constexpr, layout: gl.constexpr):
    """Exponentials of a block's scores, and what the sums before are multiplied by."""
    if MASKED:
        at = block + gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, layout))
        scores = gl.where(at[None, :] <= last[:, None], scores, float("-inf"))
    higher = gl.maximum(highest, gl.max(scores, 1) * scale)
    p = gl.exp2(scores * scale - higher[:, None])
    shrink = gl.exp2(highest - higher)
    return p, higher, weight * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _step(
    index, p, acc, weight, highest, q, keys, values, bars, scale, last,
    MASKED: gl.constexpr, score_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """The scores of block `index` and the values of the one before."""
    key_bars, key_free, value_bars, value_free = bars
    STAGES: gl.constexpr = keys.shape[0]
    ROWS: gl.constexpr = q.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    slot = index % STAGES
    mbarrier.wait(key_bars.index(slot), (index // STAGES) & 1)
    scores = gl.zeros((ROWS, BLOCK_N), gl.float32, score_layout)
    scores = warpgroup_mma(q, keys.index(slot).permute((1, 0)), scores, use_acc=False, is_async=True)
    before = index - 1
    slot_before = before % STAGES
    mbarrier.wait(value_bars.index(slot_before), (before // STAGES) & 1)
    acc = warpgroup_mma(p, values.index(slot_before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(key_free.index(slot), count=1)
    new_p, highest, weight, shrink = _softmax(
        scores, highest, weight, scale, last, index * BLOCK_N, MASKED, score_layout
    )
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(value_free.index(slot_before), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, p_layout.parent))[:, None]
    return gl.convert_layout(new_p.to(q.dtype), p_layout), acc, weight, highest


@gluon.jit
def _compute(
    half: gl.constexpr, queries, keys, values, q_bar, bars, out_ptr, start, first, count, blocks, head, scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Half of a tile's rows."""
    key_bars, key_free, value_bars, _ = bars
    STAGES: gl.constexpr = keys.shape[0]
    ROWS: gl.constexpr = queries.shape[1]
    DIM: gl.constexpr = queries.shape[2]
    BLOCK_N: gl.constexpr = keys.shape[1]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    q = queries.index(half)
    first += half * (ROWS // GROUP)
    seen_by_all = (first + 1) // BLOCK_N
    last = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, score_layout)) // GROUP
    highest = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(1, score_layout))
    weight = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, score_layout))
    acc = gl.zeros((ROWS, DIM), gl.float32, acc_layout)
    mbarrier.wait(q_bar, 0)
    mbarrier.wait(key_bars.index(0), 0)
    scores = gl.zeros((ROWS, BLOCK_N), gl.float32, score_layout)
    scores = warpgroup_mma(q, keys.index(0).permute((1, 0)), scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(key_free.index(0), count=1)
    p, highest, weight, _ = _softmax(scores, highest, weight, scale, last, 0, True, score_layout)
    p = gl.convert_layout(p.to(q.dtype), p_layout)
    for index in range(1, min(seen_by_all, blocks)):
        p, acc, weight, highest = _step(
            index, p, acc, weight, highest, q, keys, values, bars, scale, last, False, score_layout, p_layout
        )
    for index in range(max(min(seen_by_all, blocks), 1), blocks):
        p, acc, weight, highest = _step(
            index, p, acc, weight, highest, q, keys, values, bars, scale, last, True, score_layout, p_layout
        )
    final = blocks - 1
    mbarrier.wait(value_bars.index(final % STAGES), (final // STAGES) & 1)
    acc = warpgroup_mma(p, values.index(final % STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, acc_layout))
    d = gl.arange(0, DIM, layout=gl.SliceLayout(0, acc_layout))
    token = first + row // GROUP
    acc = acc / gl.convert_layout(weight, gl.SliceLayout(1, acc_layout))[:, None]
    at = (start + token).to(gl.int64) * (HEADS * DIM) + (head * GROUP + row % GROUP) * DIM
    gl.store(out_ptr + at[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=(token < count)[:, None])


@gluon.jit
def _load(
    q_rows, kv_rows, queries, keys, values, q_bar, bars, start, first, blocks, head,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Everything that the others compute with."""
    key_bars, key_free, value_bars, value_free = bars
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    DIM: gl.constexpr = keys.shape[2]
    TOKENS: gl.constexpr = q_rows.block_type.shape[0]
    HEADS: gl.constexpr = KV_HEADS * GROUP
    mbarrier.expect(q_bar, 2 * q_rows.block_type.nbytes)
    for half in gl.static_range(2):
        place = queries.index(half).reshape(q_rows.block_type.shape)
        async_load(q_rows, [start + first + half * TOKENS, head * GROUP, 0], q_bar, place)
    for index in range(blocks):
        slot = index % STAGES
        free = (index // STAGES) & 1 ^ 1
        row = start + index * BLOCK_N
        mbarrier.wait(key_free.index(slot), free)
        mbarrier.expect(key_bars.index(slot), kv_rows.block_type.nbytes)
        async_load(kv_rows, [row, (HEADS + head) * DIM], key_bars.index(slot), keys.index(slot))
        mbarrier.wait(value_free.index(slot), free)
        mbarrier.expect(value_bars.index(slot), kv_rows.block_type.nbytes)
        async_load(kv_rows, [row, (HEADS + KV_HEADS + head) * DIM], value_bars.index(slot), values.index(slot))


@gluon.jit
def _attention_kernel(
    q_rows, kv_rows, out_ptr, tiles_ptr, starts_ptr, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, LOADING_WARPS: gl.constexpr,
    COMPUTING_REGISTERS: gl.constexpr, LOADING_REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One tile: tokens with GROUP query heads each, over the tokens of their request up to each."""
    TOKENS: gl.constexpr = q_rows.block_type.shape[0]
    DIM: gl.constexpr = q_rows.block_type.shape[2]
    ROWS: gl.constexpr = TOKENS * GROUP
    BLOCK_N: gl.constexpr = kv_rows.block_type.shape[0]
    HEADS: gl.constexpr = KV_HEADS * GROUP
    tile = gl.program_id(0) // KV_HEADS
    head = gl.program_id(0) % KV_HEADS
    request = gl.load(tiles_ptr + 2 * tile)
    first = gl.load(tiles_ptr + 2 * tile + 1)
    start = gl.load(starts_ptr + request)
    count = gl.load(starts_ptr + request + 1) - start
    blocks = gl.cdiv(min(first + 2 * TOKENS, count), BLOCK_N)

    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], q_rows.dtype)
    queries = gl.allocate_shared_memory(q_rows.dtype, [2, ROWS, DIM], q_layout)
    keys = gl.allocate_shared_memory(kv_rows.dtype, [STAGES, BLOCK_N, DIM], kv_rows.layout)
    values = gl.allocate_shared_memory(kv_rows.dtype, [STAGES, BLOCK_N, DIM], kv_rows.layout)
    q_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    key_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bar, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(key_bars.index(slot), count=1)
        mbarrier.init(key_free.index(slot), count=2)
        mbarrier.init(value_bars.index(slot), count=1)
        mbarrier.init(value_free.index(slot), count=2)
    bars = (key_bars, key_free, value_bars, value_free)
    compute = (queries, keys, values, q_bar, bars, out_ptr, start, first, count, blocks, head, scale, HEADS, GROUP)
    gl.warp_specialize(
        [
            (_compute, (gl.constexpr(0),) + compute),  # noqa: RUF005 - Triton unpacks nothing
            (_compute, (gl.constexpr(1),) + compute),  # noqa: RUF005
            (_load, (q_rows, kv_rows, queries, keys, values, q_bar, bars, start, first, blocks, head, KV_HEADS, GROUP)),
        ],
        [num_warps, LOADING_WARPS],
        [COMPUTING_REGISTERS, LOADING_REGISTERS],
    )
