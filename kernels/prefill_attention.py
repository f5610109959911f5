"""Causal attention of prompts, many requests in one launch: flash attention (arXiv:2205.14135, 2307.08691).

A request's queries are the last tokens of its context. Keys and values come from the paged cache (chunks after a
prefix) or, where no request has a prefix, straight from the projections that made them (packed rows). A *plan* holds
what all layers of a forward share.

On a GPU a program computes one tile: some tokens' queries of all heads that share a KV head, so that each key is read
once for all of them. Tiles with the longest contexts go first, and short ones fill the gaps at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from headrace.kernels.launch import is_hopper, power_of_two
from headrace.kernels.launcher import Launcher
from headrace.kernels.optional_triton import TensorDescriptor, tl, triton
from headrace.kernels.paged_attention import gather_rows, page_rows
from headrace.kernels.upload import upload

if is_hopper():
    from headrace.kernels.hopper_attention import can_attend, hopper_attention

QUERY_BLOCK = 256
"""The torch path computes so many queries at once: bounds the mask, skips keys in the future of all of them."""
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tiling:
    """How the work is cut."""

    block_m: int
    """Rows of a tile: tokens times query heads a KV head."""
    block_n: int
    """Keys at once."""
    num_warps: int
    num_stages: int
    """How many loads are in flight."""
    descriptors: bool = False
    """Load packed keys and values by tensor descriptors (TMA) instead of pointers."""


@dataclass(frozen=True)
class TilePlan:
    """A plan for the Triton kernel; int32 tensors on the device."""

    tiles: torch.Tensor
    """[tiles, 2]: a request, and the first of the tile's queries among that request's. Those of requests without any
    queries compute nothing."""
    query_starts: torch.Tensor
    """[B + 1]: where each request's queries start in the packed rows."""
    context_lengths: torch.Tensor
    """[B]."""
    block_table: torch.Tensor
    """[B, max_pages]."""
    tiling: Tiling
    has_prefix: bool
    """Whether a request has more context than queries."""


@dataclass(frozen=True)
class PrefillRequest:
    """One request's part of a plan: its queries are the last tokens of its context."""

    first_row: int
    query_length: int
    context_length: int
    gather: torch.Tensor
    """Of `page_rows`, keys before values, head by head."""


@dataclass(frozen=True)
class TorchPlan:
    """A plan for torch: `mask` is additive, [QUERY_BLOCK, width]; its last rows and columns are the newest tokens."""

    requests: list[PrefillRequest]
    mask: torch.Tensor


PACKED_TILINGS = {
    64: Tiling(128, 128, 8, 3, descriptors=True),
    128: Tiling(128, 128, 8, 2, descriptors=True),
    256: Tiling(128, 64, 8, 2, descriptors=True),
}
PAGED_TILINGS = {64: Tiling(128, 64, 8, 3), 128: Tiling(128, 64, 8, 3), 256: Tiling(128, 32, 8, 2)}
SHORT_TILINGS = {64: Tiling(64, 64, 4, 3), 128: Tiling(64, 64, 4, 2), 256: Tiling(64, 32, 4, 2)}
FLOAT32_TILING = Tiling(32, 32, 4, 1)
MAX_HEAD_DIM, MAX_GROUP = 256, 32
"""What the tilings are for; other shapes run in torch."""
FEW_TOKENS = 1024
"""Below, more and smaller tiles fill the device better, and a descriptor takes longer to make than it saves."""


def choose_tiling(head_dim: int, dtype: torch.dtype, has_prefix: bool, tokens: int) -> Tiling:
    """The tables' tiling for a head size, which is padded to a power of two, and a number of queries."""
    if dtype == torch.float32:
        return FLOAT32_TILING
    table = SHORT_TILINGS if tokens < FEW_TOKENS else PAGED_TILINGS if has_prefix else PACKED_TILINGS
    return table[max(64, power_of_two(head_dim))]


def plan_prefill(
    layer_pages: torch.Tensor,
    block_table: torch.Tensor,
    query_lengths: Sequence[int],
    context_lengths: Sequence[int],
    num_heads: int,
) -> TorchPlan | TilePlan:
    """Plan for requests whose queries lie one after the other; block_table int64 [B, max_pages]."""
    kv_heads, head_dim = layer_pages.shape[2], layer_pages.shape[4]
    group = num_heads // kv_heads
    if layer_pages.is_cuda and head_dim <= MAX_HEAD_DIM and group <= MAX_GROUP:
        has_prefix = list(query_lengths) != list(context_lengths)
        tiling = choose_tiling(head_dim, layer_pages.dtype, has_prefix, sum(query_lengths))
        return plan_tiles(block_table, query_lengths, context_lengths, group, tiling)
    requests, row = [], 0
    for index, (queries, context) in enumerate(zip(query_lengths, context_lengths, strict=True)):
        gather = gather_rows(block_table[index : index + 1], layer_pages, context)
        requests.append(PrefillRequest(row, queries, context, gather))
        row += queries
    block = min(QUERY_BLOCK, max(query_lengths, default=0))
    return TorchPlan(requests, _mask(block, max(context_lengths, default=0), layer_pages))


def plan_tiles(
    block_table: torch.Tensor,
    query_lengths: Sequence[int],
    context_lengths: Sequence[int],
    group: int,
    tiling: Tiling,
) -> TilePlan:
    """Cut the queries into tiles, longest context first. Nothing waits for the device."""
    lengths, contexts = np.asarray(query_lengths, np.int32), np.asarray(context_lengths, np.int32)
    tiles = cut_tiles(lengths, contexts, tiling.block_m // group).reshape(-1)
    starts = np.concatenate((np.zeros(1, np.int32), lengths.cumsum(dtype=np.int32)))
    on_device = upload((tiles, starts, contexts), block_table.device)
    return TilePlan(
        tiles=on_device[0].view(-1, 2),
        query_starts=on_device[1],
        context_lengths=on_device[2],
        block_table=block_table.to(torch.int32),
        tiling=tiling,
        has_prefix=bool((contexts != lengths).any()),
    )


def cut_tiles(lengths: np.ndarray, contexts: np.ndarray, tokens: int) -> np.ndarray:
    """Tiles of so many tokens as `TilePlan` has them, int32 [tiles, 2], of requests' query and context lengths."""
    counts = -(-lengths // tokens)
    requests = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
    ordinals = np.arange(counts.sum(), dtype=np.int32) - np.repeat(counts.cumsum() - counts, counts)
    first = (ordinals * tokens).astype(np.int32)
    order = np.argsort(-(first + (contexts - lengths)[requests]), kind="stable")
    return np.stack((requests, first), axis=1)[order]


def prefill_attention(
    queries: torch.Tensor,
    layer_pages: torch.Tensor,
    plan: TorchPlan | TilePlan,
    scaling: float,
    qkv: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from queries [T, heads, head_dim] over each request's pages, which hold its new tokens already.

    layer_pages: [pages, 2, kv_heads, page_size, head_dim]. Returns [T, heads * head_dim]. `qkv`: the packed projection
    with rotated keys (`rope_cache`), which is read instead of pages where no request has a prefix.
    """
    if isinstance(plan, TorchPlan):
        return _reference(queries, layer_pages, plan, scaling)
    if qkv is not None and not plan.has_prefix:
        return attend_packed(queries, qkv, plan, scaling, layer_pages.shape[2])
    return attend_paged(queries, layer_pages, plan, scaling)


def attend_packed(
    queries: torch.Tensor, qkv: torch.Tensor, plan: TilePlan, scaling: float, kv_heads: int
) -> torch.Tensor:
    """Attend among the tokens of each request, none of which has a prefix.

    queries [T, heads, head_dim]; qkv [T, (heads + 2 kv_heads) * head_dim], of which keys and values are read. Returns
    [T, heads * head_dim].
    """
    tokens, heads, head_dim = queries.shape
    if is_hopper() and plan.tiling == PACKED_TILINGS.get(head_dim) and can_attend(queries, kv_heads):
        out = queries.new_empty(tokens, heads * head_dim)
        hopper_attention(queries, qkv, out, plan.tiles, plan.query_starts, kv_heads, scaling * LOG2_E)
        return out
    places = (heads * head_dim, (heads + kv_heads) * head_dim, qkv.stride(0))
    return _launch(queries, qkv, plan, scaling, 1.0, kv_heads, places, page_size=0)


def attend_paged(
    queries: torch.Tensor,
    layer_pages: torch.Tensor,
    plan: TilePlan,
    scaling: float,
    cache_scales: tuple[float, float] = (1.0, 1.0),
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from queries [T, heads, head_dim] over pages [pages, 2, kv_heads, page_size, head_dim].

    `cache_scales` multiply what is in the cache, K and V, where it is float8. Returns [T, heads * head_dim], in `out`
    where that is given; rows that are in no tile are left alone.
    """
    kv_heads, page_size, head_dim = layer_pages.shape[2:]
    places = (0, kv_heads * page_size * head_dim, layer_pages.stride(0))
    key_scale, value_scale = cache_scales
    return _launch(queries, layer_pages, plan, scaling * key_scale, value_scale, kv_heads, places, page_size, out)


def _launch(
    queries: torch.Tensor,
    kv: torch.Tensor,
    plan: TilePlan,
    scaling: float,
    value_scale: float,
    kv_heads: int,
    places: tuple[int, int, int],
    page_size: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`places`: the first key and the first value in `kv`, and the stride of its tokens (or pages), in numbers."""
    tokens, heads, head_dim = queries.shape
    if out is None:
        out = queries.new_empty(tokens, heads * head_dim)
    tiles, tiling = len(plan.tiles), plan.tiling
    if tiles == 0:
        return out
    descriptors = tiling.descriptors and page_size == 0 and head_dim == power_of_two(head_dim)
    kv_rows = _descriptor(kv, tiling.block_n, head_dim) if descriptors else None
    _launch_attention(
        (tiles * kv_heads, 1, 1),
        (
            queries, kv, kv_rows, out, plan.tiles, plan.query_starts, plan.context_lengths, plan.block_table,
            plan.block_table.stride(0), scaling * LOG2_E, value_scale,
        ),
        (
            queries.stride(0), *places, kv_heads, heads // kv_heads, head_dim, max(16, power_of_two(head_dim)),
            page_size, tiling.block_m, tiling.block_n, descriptors, _precision(queries.dtype),
        ),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )  # fmt: skip
    return out


def _descriptor(x: torch.Tensor, rows: int, columns: int) -> Any:
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, columns])


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def _addresses(base, at, end, start, table_ptr, STRIDE: tl.constexpr, head, DIM: tl.constexpr, PAGE: tl.constexpr):
    """Where a KV head's tokens `at` of a request start, less where keys or values do."""
    if PAGE == 0:
        return base + (start + at).to(tl.int64) * STRIDE + head * DIM
    page = tl.load(table_ptr + at // PAGE, mask=at < end, other=0).to(tl.int64)
    return base + page * STRIDE + head * (PAGE * DIM) + at % PAGE * DIM


@triton.jit
def _attend_block(q, k, v, acc, weight, highest, scale, last, at, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One block of keys into the running softmax; rows see the keys up to `last`."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(at[None, :] <= last[:, None], scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(highest - higher)
    weight = weight * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, weight, higher


@triton.jit(do_not_specialize=["table_stride"])
def _attention_kernel(
    q_ptr, kv_ptr, kv_rows, out_ptr, tiles_ptr, starts_ptr, contexts_ptr, table_ptr, table_stride, scale, value_scale,
    Q_STRIDE: tl.constexpr, KEYS_AT: tl.constexpr, VALUES_AT: tl.constexpr, KV_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile: BLOCK_M // GROUP tokens with GROUP query heads each, over their context up to each token."""
    tokens: tl.constexpr = BLOCK_M // GROUP
    tile = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    request = tl.load(tiles_ptr + 2 * tile)
    first = tl.load(tiles_ptr + 2 * tile + 1)
    start = tl.load(starts_ptr + request)
    count = tl.load(starts_ptr + request + 1) - start
    context = tl.load(contexts_ptr + request)
    table_ptr += request.to(tl.int64) * table_stride
    row = tl.arange(0, BLOCK_M)
    token = first + row // GROUP
    last = context - count + token
    d = tl.arange(0, DIM_PADDED)
    n = tl.arange(0, BLOCK_N)
    is_row = ((row < tokens * GROUP) & (token < count))[:, None] & (d < DIM)[None, :]
    column = ((head * GROUP + row % GROUP) * DIM)[:, None] + d[None, :]
    place = (start + token).to(tl.int64)[:, None]
    # all loads below are of what the kernels ahead have made
    q = tl.load(q_ptr + place * Q_STRIDE + column, mask=is_row, other=0.0)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM_PADDED), tl.float32)
    # all rows see all of these keys
    seen_by_all = (context - count + first + 1) // BLOCK_N * BLOCK_N
    for block in tl.range(0, seen_by_all, BLOCK_N):
        if DESCRIPTORS:
            k = kv_rows.load([start + block, KEYS_AT + head * DIM])
            v = kv_rows.load([start + block, VALUES_AT + head * DIM])
        else:
            at = block + n
            row_at = _addresses(kv_ptr, at, context, start, table_ptr, KV_STRIDE, head, DIM, PAGE)[:, None] + d[None, :]
            if DIM == DIM_PADDED:
                k = tl.load(row_at + KEYS_AT)
                v = tl.load(row_at + VALUES_AT)
            else:
                k = tl.load(row_at + KEYS_AT, mask=(d < DIM)[None, :], other=0.0)
                v = tl.load(row_at + VALUES_AT, mask=(d < DIM)[None, :], other=0.0)
        acc, weight, highest = _attend_block(
            q, k.to(q.dtype), v.to(q.dtype), acc, weight, highest, scale, last, block + n, False, PRECISION
        )
    end = tl.minimum(context - count + first + tokens, context)
    for block in tl.range(seen_by_all, end, BLOCK_N):
        at = block + n
        there = (at < end)[:, None] & (d < DIM)[None, :]
        row_at = _addresses(kv_ptr, at, end, start, table_ptr, KV_STRIDE, head, DIM, PAGE)[:, None] + d[None, :]
        k = tl.load(row_at + KEYS_AT, mask=there, other=0.0)
        v = tl.load(row_at + VALUES_AT, mask=there, other=0.0)
        acc, weight, highest = _attend_block(
            q, k.to(q.dtype), v.to(q.dtype), acc, weight, highest, scale, last, at, True, PRECISION
        )
    out = acc * (value_scale / tl.where(weight > 0, weight, 1.0))[:, None]  # 0: a tile of a request without queries
    tl.store(out_ptr + place * (KV_HEADS * GROUP * DIM) + column, out.to(out_ptr.dtype.element_ty), mask=is_row)


_launch_attention = Launcher(_attention_kernel)


def _mask(block: int, width: int, like: torch.Tensor) -> torch.Tensor:
    width = max(width, block)
    query = torch.arange(width - block, width, device=like.device).unsqueeze(1)
    key = torch.arange(width, device=like.device)
    return torch.zeros(block, width, dtype=like.dtype, device=like.device).masked_fill_(key > query, float("-inf"))


def _reference(queries: torch.Tensor, layer_pages: torch.Tensor, plan: TorchPlan, scaling: float) -> torch.Tensor:
    _, _, kv_heads, _, head_dim = layer_pages.shape
    rows = page_rows(layer_pages)
    group = queries.shape[1] // kv_heads
    out = torch.empty_like(queries)
    by_head = queries.view(-1, kv_heads, group, head_dim)
    out_by_head = out.view(-1, kv_heads, group, head_dim)
    for request in plan.requests:
        keys, values = rows.index_select(0, request.gather).view(2, kv_heads, -1, head_dim).unbind()
        for start in range(0, request.query_length, QUERY_BLOCK):
            count = min(QUERY_BLOCK, request.query_length - start)
            context = request.context_length - request.query_length + start + count
            at = slice(request.first_row + start, request.first_row + start + count)
            mask = plan.mask[-count:, -context:].repeat_interleave(group, dim=0)
            folded = by_head[at].transpose(0, 1).reshape(kv_heads, count * group, head_dim)
            seen = (keys[:, :context].unsqueeze(0), values[:, :context].unsqueeze(0))
            attended = F.scaled_dot_product_attention(folded.unsqueeze(0), *seen, attn_mask=mask, scale=scaling)
            out_by_head[at] = attended.view(kv_heads, count, group, head_dim).transpose(0, 1)
    return out.flatten(1)
