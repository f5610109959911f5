"""The decode kernels on a real GPU against their torch references."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.attention_plan import HeadShape
from headrace.kernels.fp8_linear import Fp8Linear
from tests.kernels.comparisons import (
    compare_begin_decode,
    compare_decode_attention,
    compare_decode_linear,
    compare_draft_rows,
    compare_quantize_rows,
    compare_row_changes,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("surrounded", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128])
@pytest.mark.parametrize("shape", [(4096, 4096), (9000, 2048), (960, 576), (576, 1536), (1000, 264), (1000, 14336)])
def test_a_projection_equals_its_reference(
    rows: int, shape: tuple[int, int], activation: str | None, surrounded: bool
) -> None:
    """All tilings, whole and partial tiles, one and several a program, weights in registers and in a ring."""
    compare_decode_linear("cuda", torch.bfloat16, (rows, *shape), activation, surrounded)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("rows", [1, 16, 32, 64, 128])
def test_weights_of_8_bits_are_scaled_by_output(rows: int, activation: str | None) -> None:
    """Gate and up have scales of their own."""
    compare_decode_linear("cuda", torch.bfloat16, (rows, 1024, 4096), activation, True, fp8=True)


@pytest.mark.parametrize(("rows", "size"), [(3, 576), (100, 14336)])
def test_rows_become_8_bits(rows: int, size: int) -> None:
    """As on the CPU."""
    compare_quantize_rows("cuda", torch.bfloat16, rows, size)


@pytest.mark.parametrize("rows", [1, 17, 300])
def test_a_projection_of_8_bits_is_near_the_exact_one(rows: int) -> None:
    """Both operands rounded to 8 bits: a few percent of the result's deviation."""
    x, weight = torch.randn(rows, 4096, device="cuda").bfloat16(), torch.randn(1024, 4096, device="cuda").bfloat16()
    got, exact = Fp8Linear(weight)(x).double(), x.double() @ weight.double().T
    assert (got - exact).square().mean().sqrt() < 0.06 * exact.std()


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("normed", [False, True])
def test_attention_equals_its_reference(dim: int, group: int, page_size: int, normed: bool) -> None:
    """Long, short, first-token and empty rows in one launch; one request alone; many that are alike."""
    shape = HeadShape(8, group, dim, dim)
    for positions in ([0, 5, 33, -1, 640, 17, 4000, 63, 64, 65], [700], [100] * 130):
        for as_many in (False, True):
            compare_decode_attention("cuda", torch.bfloat16, positions, shape, page_size, normed, as_many=as_many)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("page_size", [16, 64])
def test_drafts_see_the_rows_before_them(dim: int, group: int, page_size: int) -> None:
    """Drafts of less and more than a tile in one launch; one request alone; many that are alike; trees."""
    shape = HeadShape(8, group, dim, dim)
    for positions, drafts in (
        ([0, 5, 150, 63, 4000, 17], [3, 0, 15, 4, 1, 7]),
        ([700], [5]),
        ([100] * 40, [5] * 40),
    ):
        compare_decode_attention("cuda", torch.bfloat16, positions, shape, page_size, group == 3, drafts=drafts)
    several = {"drafts": [3, 8, 6], "leaves": 5}
    compare_decode_attention("cuda", torch.bfloat16, [0, 150, 4000], shape, page_size, group == 3, **several)


@pytest.mark.parametrize("lengths", [[0], [15], [3, 0, 15, 1, 1], [15] * 8, [2] * 40])
def test_rows_of_drafts_and_what_stands_equal_their_reference(lengths: list[int]) -> None:
    """Requests with and without drafts; some rows are nobody's."""
    rows = sum(lengths) + len(lengths)
    compare_draft_rows("cuda", lengths, rows + 5, rows)


@pytest.mark.parametrize("moved", [0, 1, 5])
@pytest.mark.parametrize("cells", [0, 1, 700])
def test_changed_rows_and_pages_equal_their_reference(moved: int, cells: int) -> None:
    """Rows that take over the state of others, in circles too, rows that join, and nothing at all."""
    compare_row_changes("cuda", moved, cells)


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 16])
@pytest.mark.parametrize("page_size", [16, 64])
def test_a_cache_of_8_bits_holds_rounded_keys(dim: int, group: int, page_size: int) -> None:
    """What is written is what attention of later steps sees."""
    options = {"normed": dim == 64, "cache_dtype": torch.float8_e4m3fn}
    shape = HeadShape(8, group, dim, dim)
    for as_many in (False, True):
        compare_decode_attention("cuda", torch.bfloat16, [0, 400, -1, 31], shape, page_size, as_many=as_many, **options)
        compare_decode_attention("cuda", torch.bfloat16, [0, 40], shape, 16, drafts=[2, 6], as_many=as_many, **options)


def test_a_step_begins_with_embeddings() -> None:
    """A hidden size that is no power of two."""
    compare_begin_decode("cuda", torch.bfloat16, 33, 576)
