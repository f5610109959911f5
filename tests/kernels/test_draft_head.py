"""The kernels of a draft head in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.comparisons import compare_guesses


@pytest.mark.parametrize(("requests", "vocabulary", "hidden"), [(1, 90, 48), (3, 5000, 64)])
def test_kernels_equal_their_references(requests: int, vocabulary: int, hidden: int) -> None:
    """One block of the vocabulary and several, one request and one that is not there."""
    compare_guesses("cpu", torch.float32, requests, vocabulary, hidden)
