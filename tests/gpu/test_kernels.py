"""The decode kernels on a real GPU against their torch references."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.decode_attention import HeadShape
from tests.kernels.comparisons import compare_begin_decode, compare_decode_attention, compare_decode_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("surrounded", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("shape", [(4096, 4096), (960, 576), (1000, 14336)])
def test_a_projection_equals_its_reference(
    rows: int, shape: tuple[int, int], activation: str | None, surrounded: bool
) -> None:
    """All tilings, whole and partial tiles."""
    compare_decode_linear("cuda", torch.bfloat16, (rows, *shape), activation, surrounded)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("normed", [False, True])
def test_attention_equals_its_reference(dim: int, group: int, page_size: int, normed: bool) -> None:
    """Long, short, first-token and empty rows in one launch; one request alone; many that are alike."""
    shape = HeadShape(8, group, dim, dim)
    for positions in ([0, 5, 33, -1, 640, 17, 4000, 63, 64, 65], [700], [100] * 130):
        compare_decode_attention("cuda", torch.bfloat16, positions, shape, page_size, normed)


def test_a_step_begins_with_embeddings() -> None:
    """A hidden size that is no power of two."""
    compare_begin_decode("cuda", torch.bfloat16, 33, 576)
