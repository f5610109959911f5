"""Decode attention and the start of a step in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.attention_plan import HeadShape
from tests.kernels.comparisons import compare_begin_decode, compare_decode_attention

SHAPES = [
    (HeadShape(2, group, dim, dim), page) for group, dim, page in ((1, 64, 16), (3, 80, 32), (4, 96, 64), (16, 128, 16))
]


@pytest.mark.parametrize(("shape", "page_size"), [*SHAPES, (HeadShape(1, 2, 256, 128), 16)])
def test_attention_equals_its_reference(shape: HeadShape, page_size: int) -> None:
    """Head sizes, group sizes and page sizes; long, short, first-token and empty rows in one launch."""
    for as_many in (False, True):
        compare_decode_attention("cpu", torch.float32, [0, 5, 150, -1, 64, 17], shape, page_size, as_many=as_many)


@pytest.mark.parametrize("as_many", [False, True])
@pytest.mark.parametrize("positions", [[900], [63] * 7, [1]])
def test_the_work_is_shared_whatever_the_batch(positions: list[int], as_many: bool) -> None:
    """One request over all programs, and several requests a program; with norms of Q and K."""
    shape = HeadShape(2, 2, 32, 16)
    compare_decode_attention("cpu", torch.float32, positions, shape, 16, normed=True, as_many=as_many)


@pytest.mark.parametrize(("shape", "page_size"), [*SHAPES[:3], (HeadShape(1, 16, 32, 16), 16)])
@pytest.mark.parametrize("normed", [False, True])
def test_drafts_see_the_rows_before_them(shape: HeadShape, page_size: int, normed: bool) -> None:
    """Drafts of less and more than a tile, across a page's end, without a cached token, and none, in one launch."""
    positions, drafts = [0, 5, 150, 63, 64, 17], [3, 0, 15, 4, 1, 7]
    compare_decode_attention("cpu", torch.float32, positions, shape, page_size, normed, drafts=drafts, as_many=normed)


@pytest.mark.parametrize("shape", [SHAPES[0][0], HeadShape(1, 16, 32, 16)])
def test_leaves_see_themselves_and_the_chain_before_them(shape: HeadShape) -> None:
    """In the chain's tile and in others, across a page's end; each is kept in a slot of its own."""
    positions, drafts = [0, 5, 150, 63], [3, 0, 8, 4]
    compare_decode_attention("cpu", torch.float32, positions, shape, 16, normed=True, drafts=drafts, leaves=5)


def test_one_draft_is_shared_by_all_programs() -> None:
    """And merged again."""
    compare_decode_attention("cpu", torch.float32, [900], HeadShape(2, 3, 32, 32), 16, drafts=[5])


def test_a_cache_of_8_bits_holds_rounded_keys() -> None:
    """What is written is what attention of later steps sees."""
    shape = HeadShape(2, 2, 32, 32)
    compare_decode_attention("cpu", torch.float32, [0, 40], shape, 16, cache_dtype=torch.float8_e4m3fn)


def test_a_step_begins_with_embeddings() -> None:
    """A hidden size that is no power of two."""
    compare_begin_decode("cpu", torch.float32, 3, 72)
