"""Paged attention against softmax(QK)V on each request's own tokens."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels import paged_attention, prefill_attention
from headrace.kernels.paged_attention import decode_attention, plan_decode
from headrace.kernels.prefill_attention import plan_prefill

HEADS, KV_HEADS, HEAD_DIM, PAGE = 6, 2, 8, 4
SCALE = 0.3


class Requests:
    """Random caches of given lengths, in pages that are scattered over one tensor."""

    def __init__(self, contexts: list[int], queries: list[int]) -> None:
        counts = [-(-length // PAGE) for length in contexts]
        ids = torch.randperm(sum(counts) + 3).tolist()
        # Unused pages and slots hold finite rubbish, as reused pages do.
        self.pages = torch.randn(len(ids), 2, KV_HEADS, PAGE, HEAD_DIM)
        self.table = torch.zeros(len(contexts), max(counts), dtype=torch.int64)
        self.contexts, self.query_lengths = contexts, queries
        self.queries = torch.randn(sum(queries), HEADS, HEAD_DIM)
        for row, count in enumerate(counts):
            self.table[row, :count] = torch.tensor([ids.pop() for _ in range(count)])

    def naive(self) -> torch.Tensor:
        """One query and one head at a time."""
        rows, first = [], 0
        for index, (context, count) in enumerate(zip(self.contexts, self.query_lengths, strict=True)):
            pages = self.pages[self.table[index, : -(-context // PAGE)]]
            keys, values = pages.permute(1, 0, 3, 2, 4).reshape(2, -1, KV_HEADS, HEAD_DIM)[:, :context]
            for query in range(count):
                end = context - count + query + 1
                for head in range(HEADS):
                    kv = head // (HEADS // KV_HEADS)
                    scores = keys[:end, kv] @ self.queries[first + query, head] * SCALE
                    rows.append(scores.softmax(0) @ values[:end, kv])
            first += count
        return torch.stack(rows).view(-1, HEADS * HEAD_DIM)


def test_decode_equals_naive_attention() -> None:
    """Unsorted lengths, some equal, one of a single token."""
    requests = Requests([9, 1, 16, 9, 4], [1] * 5)
    plan = plan_decode(requests.pages, requests.table, requests.query_lengths, requests.contexts)
    got = decode_attention(requests.queries, requests.pages, plan, SCALE)
    torch.testing.assert_close(got, requests.naive(), atol=1e-5, rtol=1e-5)


def test_decode_in_several_groups_equals_naive_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gather budget of one short request makes a group of almost every request."""
    monkeypatch.setattr(paged_attention, "GATHER_BYTES", 2000)
    requests = Requests([30, 2, 7, 5, 31, 2], [1] * 6)
    plan = plan_decode(requests.pages, requests.table, requests.query_lengths, requests.contexts)
    assert len(plan.groups) > 2
    got = decode_attention(requests.queries, requests.pages, plan, SCALE)
    torch.testing.assert_close(got, requests.naive(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [3, 256])
def test_prefill_equals_naive_attention(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole prompt, a chunk after a prefix, a single token, and blocks smaller and larger than the prompts."""
    monkeypatch.setattr(prefill_attention, "QUERY_BLOCK", block)
    requests = Requests([7, 13, 5, 8], [7, 4, 1, 8])
    plan = plan_prefill(requests.pages, requests.table, requests.query_lengths, requests.contexts, HEADS)
    got = prefill_attention.prefill_attention(requests.queries, requests.pages, plan, SCALE)
    torch.testing.assert_close(got, requests.naive(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [2000, 2**22])
def test_drafts_of_different_lengths_attend_like_prompts(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """One to nine queries a request, in one group a size class and in almost one a request."""
    monkeypatch.setattr(paged_attention, "GATHER_BYTES", budget)
    requests = Requests([30, 2, 7, 5, 31, 2, 9, 16], [9, 1, 4, 3, 1, 2, 9, 5])
    plan = plan_decode(requests.pages, requests.table, requests.query_lengths, requests.contexts)
    assert len(plan.groups) == {2000: 7, 2**22: 5}[budget]
    got = decode_attention(requests.queries, requests.pages, plan, SCALE)
    torch.testing.assert_close(got, requests.naive(), atol=1e-5, rtol=1e-5)
