"""The sampling kernel in Triton's interpreter against the torch sampler."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels import sample as kernel
from headrace.messages.request import SamplingParams
from tests.engine.compare_samplers import compare, compare_table, masked, some_params

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow encountered")  # as on a GPU


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SEARCH_BLOCK", 128)


@pytest.mark.parametrize(("scale", "dtype"), [(0.1, torch.float32), (3.0, torch.float16)])
def test_rows_of_all_kinds_give_the_torch_samplers_tokens(scale: float, dtype: torch.dtype) -> None:
    """Flat and peaked rows; float16 brings many equal logits."""
    params = some_params(150)
    compare((torch.randn(len(params), 150) * scale).to(dtype), params, 2, 64, "cpu")


def test_more_candidates_than_fit_are_sought_in_the_whole_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """No level has as few tokens as the copy holds."""
    monkeypatch.setattr(kernel, "CANDIDATES", 16)
    params = [SamplingParams(max_tokens=9, seed=seed, top_p=0.8, top_k=seed * 25) for seed in range(5)]
    compare(torch.randn(5, 130) * 0.2, params, 2, 64, "cpu")


def test_equal_logits_are_kept_in_vocabulary_order() -> None:
    """Filters that end among equals keep the first of them."""
    fields = [{"top_k": 3}, {"top_p": 0.26}, {"top_k": 10, "top_p": 0.5}, {"min_p": 0.5}, {}]
    params = [SamplingParams(max_tokens=9, seed=seed, **own) for seed, own in enumerate(fields * 3)]
    compare(torch.zeros(15, 40), params, 2, 16, "cpu")


@pytest.mark.parametrize("left", [1, 40])
def test_rows_of_which_a_grammar_leaves_little(left: int) -> None:
    """Whole parts of the vocabulary may be impossible, and fewer tokens be left than a filter keeps."""
    params = some_params(150)
    compare(masked(torch.randn(len(params), 150) * 2, left), params, 1, 64, "cpu")


def test_greedy_rows_take_the_first_of_equals() -> None:
    """Within a part and across parts."""
    logits = torch.zeros(3, 50)
    logits[0, [7, 8, 40]] = 1.0
    logits[1, [49]] = 1.0
    compare(logits, [SamplingParams(max_tokens=9, temperature=0)] * 3, 4, 16, "cpu")


def test_rows_of_a_table_are_those_of_a_sampler_of_their_own() -> None:
    """Also after others have taken them over."""
    compare_table(150, "cpu")
