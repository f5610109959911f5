"""The prefill kernel against attention written out, in any dtype and on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headrace.kernels.prefill_attention import Tiling, attend_packed, attend_paged, plan_tiles

SCALING = 0.3


@dataclass(frozen=True)
class Case:
    """Heads, pages, and each request's (queries, context)."""

    head_dim: int
    group: int
    page_size: int
    lengths: tuple[tuple[int, int], ...]
    kv_heads: int = 2


CASES = [
    Case(64, 1, 16, ((5, 5), (1, 1), (0, 0), (37, 37))),
    Case(80, 3, 32, ((1, 40), (0, 7), (20, 33))),
    Case(96, 4, 64, ((7, 71), (1, 1), (9, 9))),
    Case(128, 7, 16, ((1, 17), (33, 33)), kv_heads=1),
    Case(128, 16, 32, ((3, 50), (2, 2)), kv_heads=1),
    Case(256, 2, 16, ((18, 18), (4, 31))),
]
"""Every head, group and page size; whole prompts, chunks after a prefix, single tokens, requests without any."""


def expected(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Float64 attention of one request's last queries [Q, heads, dim] over keys [C, kv_heads, dim]."""
    count, context = queries.shape[0], keys.shape[0]
    group = queries.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,chd->hqc", queries.double(), keys) * SCALING
    hidden = torch.ones(count, context, dtype=torch.bool, device=keys.device).triu(context - count + 1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqc,chd->qhd", weights, values).flatten(1)


def compare_paged(
    case: Case, tiling: Tiling, dtype: torch.dtype, device: str, cache_dtype: torch.dtype | None = None
) -> None:
    """Pages scattered over a cache whose unused slots hold rubbish; a float8 cache is scaled."""
    scale = 1.0 if cache_dtype is None else 0.5
    counts = [-(-context // case.page_size) for _, context in case.lengths]
    ids = torch.randperm(sum(counts) + 3)[: sum(counts)].split(counts)
    shape = (sum(counts) + 3, 2, case.kv_heads, case.page_size, case.head_dim)
    pages = torch.randn(shape, device=device, dtype=dtype).to(cache_dtype or dtype)
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for row, (held, count) in enumerate(zip(ids, counts, strict=True)):
        table[row, :count] = held
    lengths, contexts = zip(*case.lengths, strict=True)
    queries = torch.randn(sum(lengths), case.kv_heads * case.group, case.head_dim, device=device, dtype=dtype)
    plan = plan_tiles(table.to(device), lengths, contexts, case.group, tiling)
    got = attend_paged(queries, pages, plan, SCALING, (scale, scale))
    first = 0
    for held, count, context in zip(ids, lengths, contexts, strict=True):
        own = pages.to(dtype)[held.to(device)].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :context] * scale
        check(got[first : first + count], expected(queries[first : first + count], *own))
        first += count


def compare_packed(case: Case, tiling: Tiling, dtype: torch.dtype, device: str) -> None:
    """Queries, keys and values are parts of one packed projection; requests have no prefix."""
    lengths = [count for count, _ in case.lengths]
    heads = case.kv_heads * case.group
    qkv = torch.randn(sum(lengths), heads + 2 * case.kv_heads, case.head_dim, device=device, dtype=dtype)
    queries, keys, values = qkv.split((heads, case.kv_heads, case.kv_heads), dim=1)
    table = torch.zeros(len(lengths), 1, dtype=torch.int32, device=device)
    plan = plan_tiles(table, lengths, lengths, case.group, tiling)
    assert not plan.has_prefix
    got = attend_packed(queries.contiguous(), qkv.flatten(1), plan, SCALING, case.kv_heads)
    for part, q, k, v in zip(*(x.split(lengths) for x in (got, queries, keys, values)), strict=True):
        check(part, expected(q, k, v))


def check(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """As close as the dtype allows."""
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}[got.dtype]
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)
