"""The sampling kernel on the chip against the torch sampler on the CPU."""

from __future__ import annotations

import pytest
import torch

from headrace.engine.device_sampler import DeviceSampler
from headrace.engine.sampler import SamplingRow
from headrace.kernels.sample import PART
from headrace.messages.request import SamplingParams
from tests.engine.compare_samplers import compare, compare_table, masked, some_params

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("vocab_size", [150, 49152, 128256])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_all_kinds_give_the_torch_samplers_tokens(vocab_size: int, scale: float, dtype: torch.dtype) -> None:
    """Flat and peaked rows; bfloat16 brings many equal logits."""
    torch.manual_seed(0)
    params = some_params(vocab_size)
    logits = (torch.randn(len(params), vocab_size) * scale).to(dtype)
    compare(logits, params, 3, PART, "cuda", strays=1)


@pytest.mark.parametrize("left", [1, 3, 300, 20000])
def test_rows_of_which_a_grammar_leaves_little(left: int) -> None:
    """Whole parts of the vocabulary may be impossible, and fewer tokens be left than a filter keeps."""
    torch.manual_seed(0)
    params = some_params(49152)
    compare(masked(torch.randn(len(params), 49152) * 2, left), params, 3, PART, "cuda", strays=1)


def test_a_row_gives_the_same_token_in_any_batch_and_in_a_graph() -> None:
    """Alone, among others, and replayed."""
    torch.manual_seed(0)
    params = [p for p in some_params(49152) if not (p.repetition_penalty != 1 or p.presence_penalty)]
    logits, positions = torch.randn(len(params), 49152, device="cuda") * 3, torch.arange(len(params), device="cuda")
    device = torch.device("cuda")

    def sampler(of: list[SamplingParams]) -> DeviceSampler:
        return DeviceSampler.of([SamplingRow.make(p, [], 0, 49152, device) for p in of], 49152, device)

    together = sampler(params)
    tokens = together.sample(logits, positions)
    alone = [sampler([p]).sample(logits[i : i + 1], positions[i : i + 1]).item() for i, p in enumerate(params)]
    assert tokens.tolist() == alone
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = together.sample(logits, positions)
    graph.replay()
    assert replayed.tolist() == alone


def test_rows_of_a_table_are_those_of_a_sampler_of_their_own() -> None:
    """Also after others have taken them over."""
    compare_table(49152, "cuda")
