"""Masked logits in Triton's interpreter, and the reference against the definition."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels import mask_logits
from tests.kernels.comparisons import compare_mask_logits


@pytest.mark.parametrize("vocabulary", [32, 97, 300])
def test_masked_logits_equal_their_reference(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than a block, and more than one; sizes that fill no word."""
    monkeypatch.setattr(mask_logits, "BLOCK", 128)
    compare_mask_logits("cpu", [4, 0, 2, 5], 6, vocabulary, torch.float32)
    compare_mask_logits("cpu", [1], 2, vocabulary, torch.float16)


def test_the_reference_takes_bits_from_the_lowest_on() -> None:
    """Allowed logits keep their value, and rows that are not named keep all."""
    logits = torch.randn(3, 70)
    before = logits.clone()
    masks = torch.zeros(1, 3, dtype=torch.int32)
    masks[0, 0], masks[0, 1], masks[0, 2] = 1 << 5, -(2**31), 1
    mask_logits.mask_logits(logits, torch.tensor([1]), masks)
    assert (logits[1] > float("-inf")).nonzero().flatten().tolist() == [5, 63, 64]
    assert torch.equal(logits[1, [5, 63, 64]], before[1, [5, 63, 64]])
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
