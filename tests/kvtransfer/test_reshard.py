"""Pages that were cut one way and are cut anew, compared with the whole KV cut the other way at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.engine.kv_cache import CacheLayout, KVCache
from headrace.kvtransfer.base import Destination
from headrace.kvtransfer.host import this_host
from headrace.kvtransfer.messages import Layout, SharedMemory
from headrace.kvtransfer.reshard import (
    can_recut,
    head_rows,
    heads_a_rank,
    heads_of,
    page_bytes_of,
    plan_landings,
    routes,
)
from headrace.kvtransfer.shm import SharedSource
from tests.kvtransfer.parts import LAYOUT, cut

NUM_LAYERS = 2
UNTOUCHED = 0xFFFFFFFF


def layout(kv_heads: int, ranks: int, page_size: int) -> Layout:
    """One worker's way to cut a model with heads of size 1."""
    return msgspec.structs.replace(LAYOUT, kv_heads=kv_heads, tensor_parallel_size=ranks, page_size=page_size)


def new_caches(layout: Layout, num_pages: int) -> list[KVCache]:
    """One a rank; every number in them is UNTOUCHED."""
    shape = CacheLayout("float32", NUM_LAYERS, heads_a_rank(layout), 1, layout.page_size)
    caches = [KVCache(shape, num_pages, torch.device("cpu")) for _ in range(layout.tensor_parallel_size)]
    for cache in caches:
        numbers(cache)[:] = UNTOUCHED
    return caches


def numbers(cache: KVCache) -> np.ndarray:
    """uint32 [layers, pages, 2, heads, page size]."""
    return cache.pages.view(torch.int32).numpy().view(np.uint32)[..., 0]


@dataclass(frozen=True)
class Case:
    """A prompt, how both workers cut, and where its pages lie."""

    sender: Layout
    receiver: Layout
    num_tokens: int
    held: int
    """The receiver's pages that need nothing."""
    step: int
    """The sender's pages in a message."""
    seed: int

    @property
    def tokens(self) -> list[int]:
        """The prompt."""
        return [(self.seed + 7 * token) % 1000 for token in range(self.num_tokens)]

    def page_ids(self, layout: Layout) -> list[int]:
        """Some order of pages, among others."""
        count = -(-self.num_tokens // layout.page_size)
        return list(map(int, np.random.default_rng(self.seed).permutation(count + 2)[:count]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """All that is allowed."""
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    degrees = [degree for degree in range(1, 9) if max(degree, kv_heads) % min(degree, kv_heads) == 0]
    sender, receiver = (
        layout(kv_heads, draw(st.sampled_from(degrees)), draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16]))) for _ in "12"
    )
    num_tokens = draw(st.integers(1, 50))
    held = draw(st.integers(0, num_tokens // receiver.page_size))
    return Case(sender, receiver, num_tokens, held, draw(st.integers(1, 5)), draw(st.integers(0, 99)))


@given(cases(), st.booleans())
@settings(deadline=None, max_examples=150)
def test_each_rank_has_what_a_whole_kv_cut_its_way_gives_it(case: Case, in_place: bool) -> None:
    """All that was missing, and not a number more, whichever way pages come."""
    sources = new_caches(case.sender, len(case.page_ids(case.sender)) + 2)
    for rank, cache in enumerate(sources):
        for layer in range(NUM_LAYERS):
            numbers(cache)[layer, case.page_ids(case.sender)] = cut(case.sender, rank, layer, case.tokens)
    targets = new_caches(case.receiver, len(case.page_ids(case.receiver)) + 2)
    transfer(case, sources, targets, in_place)
    for rank, cache in enumerate(targets):
        for layer in range(NUM_LAYERS):
            expected = np.full_like(numbers(cache)[layer], UNTOUCHED)
            places = case.page_ids(case.receiver)[case.held :]
            expected[places] = cut(case.receiver, rank, layer, case.tokens)[case.held :]
            arrived = numbers(cache)[layer].copy()
            if places:
                past_the_end = arrived[places[-1]][..., (case.num_tokens - 1) % case.receiver.page_size + 1 :]
                past_the_end[:] = 0  # whatever the sender's page had there
            assert np.array_equal(arrived, expected)


def transfer(case: Case, sources: list[KVCache], targets: list[KVCache], in_place: bool) -> None:
    """Send all pages that the plan asks for."""
    pages = case.page_ids(case.receiver)
    plan = plan_landings(case.sender, case.receiver, targets, case.num_tokens, pages, case.held)
    assert plan.num_pages == len(case.page_ids(case.sender))
    found = routes(case.sender, case.receiver)
    assert plan.parts in ([], [route.part for route in found])
    for route, destination in zip(found, plan.destinations, strict=True):
        heads = range(route.part.first_head, route.part.first_head + route.part.num_heads)
        for first in range(plan.held_pages, plan.num_pages, case.step):
            end = min(first + case.step, plan.num_pages)
            ids = case.page_ids(case.sender)[first:end]
            source, target = sources[route.part.rank], targets[route.rank]
            if in_place:
                copy_in_place(case, source, target, destination, first, ids)
                continue
            for layer in range(NUM_LAYERS):
                row_bytes = source.page_bytes // (2 * heads_a_rank(case.sender))
                data = source.read_rows(layer, row_bytes, head_rows(case.sender, ids, heads))
                assert len(data) == len(ids) * destination.page_bytes
                destination.write(layer, first, end - first, data)


def copy_in_place(
    case: Case, source: KVCache, target: KVCache, destination: Destination, first: int, ids: list[int]
) -> None:
    """Let the receiver read all layers in the sender's memory file."""
    assert source.descriptor is not None
    memory = SharedMemory(descriptor=source.descriptor, num_blocks=NUM_LAYERS * source.num_pages)
    page_bytes = page_bytes_of(case.sender, case.receiver, target.page_bytes)
    assert page_bytes == source.page_bytes
    opened = SharedSource(this_host(), memory, page_bytes, target)
    ends: list[Exception | None] = []
    blocks = [layer * source.num_pages + page for layer in range(NUM_LAYERS) for page in ids]
    destination.copy(opened, range(NUM_LAYERS), first, blocks, ends.append)
    assert ends == [None]


@pytest.mark.parametrize(
    ("tokens", "sender_page", "receiver_page", "held", "expected"),
    [
        (64, 16, 32, 1, 2),
        (64, 32, 16, 1, 0),
        (64, 32, 16, 3, 1),
        (64, 16, 8, 5, 2),
        (48, 32, 16, 3, 2),
        (40, 32, 16, 2, 1),
        (40, 16, 16, 2, 2),
        (30, 16, 24, 1, 1),
    ],
)
def test_only_pages_that_are_held_to_their_end_do_not_travel(
    tokens: int, sender_page: int, receiver_page: int, held: int, expected: int
) -> None:
    """Counted as the sender cuts; the prompt's end is as good as a page's."""
    pages = list(range(-(-tokens // receiver_page)))
    sender, receiver = layout(1, 1, sender_page), layout(1, 1, receiver_page)
    plan = plan_landings(sender, receiver, new_caches(receiver, len(pages)), tokens, pages, held)
    assert plan.held_pages == expected


@pytest.mark.parametrize(("kv_heads", "ranks"), [(8, 3), (3, 2), (2, 3), (4, 6)])
def test_heads_that_are_not_cut_evenly_are_refused(kv_heads: int, ranks: int) -> None:
    """No rank could say which it has."""
    assert not can_recut(layout(kv_heads, ranks, 4), layout(kv_heads, 1, 4))


@pytest.mark.parametrize("field", ["model_fingerprint", "dtype", "num_layers", "kv_heads", "head_dim", "vocab_size"])
def test_all_but_the_cut_must_agree(field: str) -> None:
    """Other models, and the same one in another type, have nothing to hand over."""
    other = {"model_fingerprint": "e" * 16, "dtype": "bfloat16"}.get(field, getattr(LAYOUT, field))
    other = 0 if isinstance(other, int) else other
    assert not can_recut(msgspec.structs.replace(LAYOUT, **{field: other}), LAYOUT)


def ranks_that_read(sender: Layout, receiver: Layout) -> Iterator[tuple[int, int]]:
    """(sending rank, receiving rank) of each part."""
    for route in routes(sender, receiver):
        yield route.part.rank, route.rank


@pytest.mark.parametrize(
    ("sender", "receiver", "expected"),
    [
        (1, 2, [(0, 0), (0, 1)]),
        (2, 1, [(0, 0), (1, 0)]),
        (2, 4, [(0, 0), (0, 1), (1, 2), (1, 3)]),
        (4, 8, [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5), (3, 6), (3, 7)]),
        (8, 8, [(rank, rank) for rank in range(8)]),
    ],
)
def test_who_sends_to_whom(sender: int, receiver: int, expected: list[tuple[int, int]]) -> None:
    """Of a model with four heads; those that hold copies of a head share its readers."""
    assert list(ranks_that_read(layout(4, sender, 1), layout(4, receiver, 1))) == expected
    assert [list(heads_of(layout(4, 8, 1), rank)) for rank in range(8)] == [[rank // 2] for rank in range(8)]
