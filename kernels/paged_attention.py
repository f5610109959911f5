"""Decode attention over a paged KV cache, one query a request, in torch.

A *plan* holds what all layers of a forward share, so that a layer only gathers pages and multiplies. Query heads that
share a KV head become rows of one matrix, so that grouped-query attention reads each key once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

GATHER_BYTES = 4 * 2**20
"""Decode gathers the pages of so many requests at once as fit: the copy is still in the cache when it is multiplied."""


@dataclass(frozen=True)
class PagedPlan:
    """A plan for kernels that follow block tables themselves; `request` [T] names each token's row of the table."""

    block_table: torch.Tensor
    """int64 [B, max_pages]."""
    request: np.ndarray


@dataclass(frozen=True)
class DecodeGroup:
    """Requests of similar length that are computed together, rows first_row to first_row + count in plan order."""

    first_row: int
    count: int
    context_length: int
    gather: torch.Tensor
    mask: torch.Tensor | None
    """Additive, [count * kv_heads, 1, context_length]."""


@dataclass(frozen=True)
class DecodePlan:
    """`order` sorts rows by length (None where they need no sorting); `buffer` receives the gathered pages."""

    groups: list[DecodeGroup]
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    buffer: torch.Tensor


def plan_decode(layer_pages: torch.Tensor, block_table: torch.Tensor, context_lengths: Sequence[int]) -> DecodePlan:
    """Plan for one query a request, at position context_length - 1; block_table int64 [B, max_pages]."""
    order = sorted(range(len(context_lengths)), key=context_lengths.__getitem__)
    is_sorted = order == list(range(len(order)))
    groups: list[DecodeGroup] = []
    buffer_size = 0
    for rows in _group_rows(order, context_lengths, _token_bytes(layer_pages)):
        lengths = [context_lengths[row] for row in rows]
        longest = lengths[-1]
        at = torch.tensor(rows, device=block_table.device)
        gather = gather_rows(block_table.index_select(0, at), layer_pages, longest)
        mask = _decode_mask(lengths, layer_pages)
        first = groups[-1].first_row + groups[-1].count if groups else 0
        groups.append(DecodeGroup(first, len(rows), longest, gather, mask))
        buffer_size = max(buffer_size, gather.numel())
    page_size, head_dim = layer_pages.shape[3:]
    buffer = layer_pages.new_empty(buffer_size, page_size * head_dim)
    if is_sorted:
        return DecodePlan(groups, None, None, buffer)
    order_tensor = torch.tensor(order, device=block_table.device)
    return DecodePlan(groups, order_tensor, order_tensor.argsort(), buffer)


def decode_attention(
    queries: torch.Tensor, layer_pages: torch.Tensor, plan: DecodePlan, scaling: float
) -> torch.Tensor:
    """Attend from one query a request, queries [B, heads, head_dim]. Returns [B, heads * head_dim]."""
    _, _, kv_heads, _, head_dim = layer_pages.shape
    rows = page_rows(layer_pages)
    scaled = (queries if plan.order is None else queries.index_select(0, plan.order)) * scaling
    folded = scaled.view(-1, queries.shape[1] // kv_heads, head_dim)
    out = torch.empty_like(folded)
    for group in plan.groups:
        at = slice(group.first_row * kv_heads, (group.first_row + group.count) * kv_heads)
        gathered = torch.index_select(rows, 0, group.gather, out=plan.buffer[: group.gather.numel()])
        keys, values = gathered.view(2, group.count * kv_heads, -1, head_dim)[:, :, : group.context_length].unbind()
        if group.mask is None:
            scores = torch.bmm(folded[at], keys.transpose(1, 2))
        else:
            scores = torch.baddbmm(group.mask, folded[at], keys.transpose(1, 2))
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        torch.bmm(weights, values, out=out[at])
    by_request = out.view(queries.shape[0], -1)
    return by_request if plan.inverse is None else by_request.index_select(0, plan.inverse)


def _token_bytes(layer_pages: torch.Tensor) -> int:
    _, _, kv_heads, _, head_dim = layer_pages.shape
    return 2 * kv_heads * head_dim * layer_pages.element_size()


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


def _group_rows(order: list[int], lengths: Sequence[int], token_bytes: int) -> list[list[int]]:
    groups: list[list[int]] = []
    for row in order:
        if groups and (len(groups[-1]) + 1) * lengths[row] * token_bytes <= GATHER_BYTES:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _decode_mask(lengths: list[int], like: torch.Tensor) -> torch.Tensor | None:
    kv_heads, longest = like.shape[2], lengths[-1]
    if lengths[0] == longest:
        return None
    ends = torch.tensor(lengths, device=like.device).unsqueeze(1)
    key = torch.arange(longest, device=like.device)
    mask = torch.zeros(len(lengths), longest, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(key >= ends, float("-inf")).repeat_interleave(kv_heads, dim=0).unsqueeze(1)
