"""Attention of drafts over a paged KV cache, several queries a request, in torch.

Each request has as many queries as it likes, the last tokens of its context; its keys are gathered once for them all.
As in `paged_attention`, requests of similar length are computed together; so are those with similar numbers of queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headrace.kernels.paged_attention import GATHER_BYTES, gather_rows, page_rows


@dataclass(frozen=True)
class VerifyGroup:
    """Requests that are computed together: `count` of them, with `queries` rows each, some of them repeated."""

    count: int
    queries: int
    context_length: int
    rows: torch.Tensor
    """[count * queries]: packed rows. A request with fewer queries has its last one several times."""
    gather: torch.Tensor
    mask: torch.Tensor
    """Additive, [count, 1, queries, 1, context_length]."""


@dataclass(frozen=True)
class VerifyPlan:
    """`place` [T] finds each packed row in the groups' outputs, laid one after the other; `buffer` receives pages."""

    groups: list[VerifyGroup]
    place: torch.Tensor
    buffer: torch.Tensor


def plan_verify(
    layer_pages: torch.Tensor,
    block_table: torch.Tensor,
    query_lengths: Sequence[int],
    context_lengths: Sequence[int],
) -> VerifyPlan:
    """Plan for requests whose queries lie one after the other; block_table int64 [B, max_pages]."""
    device = block_table.device
    first_rows = [0]
    for length in query_lengths:
        first_rows.append(first_rows[-1] + length)
    place = [0] * first_rows[-1]
    groups: list[VerifyGroup] = []
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
        placed += len(rows)
        visible = torch.arange(longest, device=device) < torch.tensor(ends, device=device).unsqueeze(1)
        mask = torch.zeros(len(rows), longest, dtype=layer_pages.dtype, device=device)
        mask.masked_fill_(~visible, float("-inf"))
        gather = gather_rows(block_table[requests], layer_pages, longest)
        groups.append(
            VerifyGroup(
                len(requests),
                queries,
                longest,
                torch.tensor(rows, device=device),
                gather,
                mask.view(len(requests), 1, queries, 1, longest),
            )
        )
        buffer_size = max(buffer_size, gather.numel())
    page_size, head_dim = layer_pages.shape[3:]
    buffer = layer_pages.new_empty(buffer_size, page_size * head_dim)
    return VerifyPlan(groups, torch.tensor(place, device=device), buffer)


def verify_attention(
    queries: torch.Tensor, layer_pages: torch.Tensor, plan: VerifyPlan, scaling: float
) -> torch.Tensor:
    """Attend from queries [T, heads, head_dim], packed. Returns [T, heads * head_dim]."""
    _, _, kv_heads, _, head_dim = layer_pages.shape
    pages = page_rows(layer_pages)
    heads = queries.shape[1]
    scaled = queries * scaling
    outputs = []
    for group in plan.groups:
        by_head = (group.count, group.queries, kv_heads, heads // kv_heads, head_dim)
        own = (
            scaled.index_select(0, group.rows)
            .view(by_head)
            .transpose(1, 2)
            .reshape(group.count * kv_heads, -1, head_dim)
        )
        gathered = torch.index_select(pages, 0, group.gather, out=plan.buffer[: group.gather.numel()])
        keys, values = gathered.view(2, group.count * kv_heads, -1, head_dim)[:, :, : group.context_length].unbind()
        scores = torch.bmm(own, keys.transpose(1, 2))
        scores.view(group.count, kv_heads, group.queries, -1, group.context_length).add_(group.mask)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        attended = torch.bmm(weights, values).view(group.count, kv_heads, group.queries, -1, head_dim)
        outputs.append(attended.transpose(1, 2).reshape(group.count * group.queries, -1))
    return torch.cat(outputs).index_select(0, plan.place)


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
