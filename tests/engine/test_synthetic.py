"""The synthetic engine counts, and takes as long as it was told to."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from headrace.engine.decode_batch import RunningBatch, new_batch
from headrace.engine.engine import EngineConfig, PrefillChunk
from headrace.engine.synthetic import SyntheticEngine
from headrace.loadtest.shapes import TINY, model_folder
from headrace.messages.request import SamplingParams
from headrace.scaling.step_costs import Cost, Limits, StepCosts

GREEDY = SamplingParams(max_tokens=8, temperature=0)
SCORED = SamplingParams(max_tokens=8, temperature=0, logprobs=1)


@pytest.fixture
def engine(tmp_path: Path) -> SyntheticEngine:
    """One whose prefill takes 1 ms a token, and whose decode steps 1 ms a row and 10 µs a token of KV."""
    costs = StepCosts(
        machine="test",
        prefill=Cost([(1, 0.001), (2, 0.002)]),
        decode=Cost([(1, 0.001), (2, 0.002)], seconds_per_context=1e-5),
        limits=Limits(pages=64),
    )
    return SyntheticEngine(EngineConfig(model_folder(TINY, tmp_path), device="cpu"), costs)


def test_a_prefill_step_sleeps_announces_its_layer_and_counts(engine: SyntheticEngine) -> None:
    """Only a complete prompt has a token, that of its output position."""
    layers: list[int] = []
    chunks = [
        PrefillChunk([5] * 40, 0, 32, [0, 1, 2], GREEDY),
        PrefillChunk([6] * 8, 0, 8, [3], GREEDY),
        PrefillChunk([7] * 10, 0, 10, [4], SCORED, generated=3),
    ]
    started = time.perf_counter()
    outputs = engine.prefill(chunks, lambda layer, ready: layers.append(layer))
    assert time.perf_counter() - started >= 0.050
    assert layers == [0]
    assert outputs[0].token is None
    quarter = engine.model_config.vocab_size // 4
    assert [output.token and output.token.token_id for output in outputs[1:]] == [quarter, quarter + 3]
    assert outputs[2].token is not None
    assert outputs[2].token.logprobs is not None


def test_decode_steps_count_on_from_where_a_request_stands(engine: SyntheticEngine) -> None:
    """Requests come and go; a step costs what its rows and their KV cost."""
    batch: RunningBatch[str] = new_batch(engine)
    quarter = engine.model_config.vocab_size // 4
    batch.join("a", [1] * 100, 1, [0], GREEDY)
    batch.join("b", [1] * 1000, 5, [1], GREEDY)
    started = time.perf_counter()
    batch.start()
    assert time.perf_counter() - started >= 0.013
    assert [(key, token.token_id - quarter) for key, token in batch.collect()] == [("a", 1), ("b", 5)]
    batch.leave("b")
    batch.start()
    assert [(key, token.token_id - quarter) for key, token in batch.collect()] == [("a", 2)]
    batch.leave("a")
    assert len(batch) == 0
    assert batch._kv_tokens == 0  # type: ignore[attr-defined]
