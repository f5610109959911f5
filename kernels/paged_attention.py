"""Attention of a decode step over a paged KV cache, in torch: one query a request, or one and its draft's.

A *plan* holds what all layers of a forward share, so that a layer only gathers pages and multiplies. Query heads that
share a KV head become rows of one matrix, so that grouped-query attention reads each key once. Each request has as many
queries as it likes, the last tokens of its context; its keys are gathered once for them all. Requests of similar length
and with similar numbers of queries are computed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

GATHER_BYTES = 4 * 2**20
"""The pages of so many requests are gathered at once as fit: the copy is still in the cache when it is multiplied."""


@dataclass(frozen=True)
class PagedPlan:
    """A plan for kernels that follow block tables themselves; `request` [T] names each token's row of the table."""

    block_table: torch.Tensor
    """int64 [B, max_pages]."""
    request: np.ndarray


@dataclass(frozen=True)
class DecodeGroup:
    """Requests that are computed together: `count` of them, with `queries` rows each, some of them repeated."""

    count: int
    queries: int
    context_length: int
    rows: torch.Tensor | slice
    """[count * queries]: packed rows. A request with fewer queries has its last one several times."""
    gather: torch.Tensor
    mask: torch.Tensor | None
    """Additive, [count, 1, queries, 1, context_length]; None where each row sees all keys."""


@dataclass(frozen=True)
class DecodePlan:
    """`buffer` receives pages."""

    groups: list[DecodeGroup]
    place: torch.Tensor | None
    """[T]: where each packed row is in the groups' outputs, laid end to end; None where that is their order."""
    buffer: torch.Tensor


def plan_decode(
    layer_pages: torch.Tensor,
    block_table: torch.Tensor,
    query_lengths: Sequence[int],
    context_lengths: Sequence[int],
) -> DecodePlan:
    """Plan for requests whose queries lie one after the other; block_table int64 [B, max_pages]."""
    device = block_table.device
    first_rows = [0]
    for length in query_lengths:
        first_rows.append(first_rows[-1] + length)
    in_order = range(first_rows[-1])
    place = [*in_order]
    groups: list[DecodeGroup] = []
    placed = buffer_size = 0
    for requests in _group_requests(query_lengths, context_lengths, layer_pages):
        queries, longest = max(query_lengths[r] for r in requests), context_lengths[requests[-1]]
        rows, ends = [], []
        for request in requests:
            own = query_lengths[request]
            for query in range(queries):
                at = min(query, own - 1)
                rows.append(first_rows[request] + at)
                ends.append(context_lengths[request] - own + at + 1)
                place[rows[-1]] = placed + len(rows) - 1
        mask = None
        if min(ends) < longest:
            hidden = torch.arange(longest, device=device) >= torch.tensor(ends, device=device).unsqueeze(1)
            mask = torch.zeros(len(rows), longest, dtype=layer_pages.dtype, device=device)
            mask = mask.masked_fill_(hidden, float("-inf")).view(len(requests), 1, queries, 1, longest)
        ordered = rows == [*range(placed, placed + len(rows))]
        own_rows = slice(placed, placed + len(rows)) if ordered else torch.tensor(rows, device=device)
        placed += len(rows)
        gather = gather_rows(block_table[requests], layer_pages, longest)
        groups.append(DecodeGroup(len(requests), queries, longest, own_rows, gather, mask))
        buffer_size = max(buffer_size, gather.numel())
    page_size, head_dim = layer_pages.shape[3:]
    buffer = layer_pages.new_empty(buffer_size, page_size * head_dim)
    return DecodePlan(groups, None if place == [*in_order] else torch.tensor(place, device=device), buffer)


def _group_requests(
    query_lengths: Sequence[int], context_lengths: Sequence[int], layer_pages: torch.Tensor
) -> list[list[int]]:
    """Requests with equally many binary digits of queries and contexts whose pages fit the processor's cache."""
    _, _, kv_heads, _, head_dim = layer_pages.shape
    token_bytes = 2 * kv_heads * head_dim * layer_pages.element_size()

    def size_class(request: int) -> int:
        return (query_lengths[request] - 1).bit_length()

    groups: list[list[int]] = []
    for request in sorted(range(len(query_lengths)), key=lambda r: (size_class(r), context_lengths[r])):
        together = groups and size_class(groups[-1][0]) == size_class(request)
        if together and (len(groups[-1]) + 1) * context_lengths[request] * token_bytes <= GATHER_BYTES:
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


def decode_attention(
    queries: torch.Tensor, layer_pages: torch.Tensor, plan: DecodePlan, scaling: float
) -> torch.Tensor:
    """Attend from queries [T, heads, head_dim], packed. Returns [T, heads * head_dim]."""
    _, _, kv_heads, _, head_dim = layer_pages.shape
    pages = page_rows(layer_pages)
    heads = queries.shape[1]
    scaled = queries * scaling
    outputs = []
    for group in plan.groups:
        by_head = (group.count, group.queries, kv_heads, heads // kv_heads, head_dim)
        own = scaled[group.rows].view(by_head).transpose(1, 2)
        gathered = torch.index_select(pages, 0, group.gather, out=plan.buffer[: group.gather.numel()])
        keys, values = gathered.view(2, group.count * kv_heads, -1, head_dim)[:, :, : group.context_length].unbind()
        scores = torch.bmm(own.reshape(group.count * kv_heads, -1, head_dim), keys.transpose(1, 2))
        if group.mask is not None:
            scores.view(group.count, kv_heads, group.queries, -1, group.context_length).add_(group.mask)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        attended = torch.bmm(weights, values).view(group.count, kv_heads, group.queries, -1, head_dim)
        outputs.append(attended.transpose(1, 2).reshape(group.count * group.queries, -1))
    packed = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return packed if plan.place is None else packed.index_select(0, plan.place)


def gather_rows(block_table: torch.Tensor, layer_pages: torch.Tensor, context_length: int) -> torch.Tensor:
    """Indices into `page_rows` that bring [B, n] pages into the order [2, B, kv_heads, n]."""
    _, _, kv_heads, page_size, _ = layer_pages.shape
    firsts = block_table[:, : -(-context_length // page_size)] * (layer_pages.stride(0) // layer_pages.stride(2))
    both = torch.stack((firsts, firsts + kv_heads)).unsqueeze(2)
    heads = torch.arange(kv_heads, device=firsts.device).view(1, 1, kv_heads, 1)
    return (both + heads).reshape(-1)


def page_rows(layer_pages: torch.Tensor) -> torch.Tensor:
    """A layer's memory as [rows, page_size * head_dim]: the keys or the values of a head in a page are one row.

    Pages may lie apart, by a whole number of rows.
    """
    num_pages, _, kv_heads, page_size, head_dim = layer_pages.shape
    width = page_size * head_dim
    rows = (num_pages - 1) * (layer_pages.stride(0) // width) + 2 * kv_heads
    return layer_pages.as_strided((rows, width), (width, 1))
