"""The sampler against formulas written out, and against its own promise of not caring for the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from headrace.engine.sampler import BatchSampler, SamplingRow, uniforms
from headrace.messages.request import SamplingParams

CPU = torch.device("cpu")
DRAWS = 4000


def params(**fields: Any) -> SamplingParams:
    """Sampling parameters with a `max_tokens` that does not matter here."""
    return SamplingParams(max_tokens=64, **fields)


def draw(logits: torch.Tensor, rows: list[SamplingParams], positions: list[int]) -> list[int]:
    """One token for each row of parameters; nothing has been said so far."""
    states = [SamplingRow.make(row, [], 0, logits.shape[1], CPU) for row in rows]
    return BatchSampler(states, logits.shape[1], CPU).sample(logits, torch.tensor(positions)).tolist()


def filtered(logits: torch.Tensor, row: SamplingParams) -> torch.Tensor:
    """The distribution by the definition of each filter in its turn: temperature, min-p, top-k, top-p."""
    p = (logits / row.temperature).double().softmax(0)
    p = torch.where(p >= row.min_p * p.max(), p, 0)
    order = p.argsort(descending=True)
    if row.top_k:
        p[order[row.top_k :]] = 0
    p /= p.sum()
    total = 0.0
    for token in order.tolist():
        if total >= row.top_p:
            p[token] = 0
        total += float(p[token])
    return p / p.sum()


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 4},
        {"temperature": 1.5, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "min_p": 0.2, "top_p": 0.8},
        {"temperature": 1.2, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_draws_follow_the_filtered_distribution(fields: dict[str, float]) -> None:
    """A chi-square test at p = 1e-4, with fixed seeds, so that it never fails by chance."""
    logits = torch.linspace(0, 2.5, 12)[torch.randperm(12)]
    expected = filtered(logits, params(**fields))
    rows = [params(seed=seed, **fields) for seed in range(DRAWS)]
    tokens = torch.tensor(draw(logits.expand(DRAWS, -1).clone(), rows, [0] * DRAWS))
    counts = torch.bincount(tokens, minlength=12).double()
    support = expected > 0
    assert not counts[~support].any(), "a token that the filters exclude was drawn"
    chi_square = float(((counts - DRAWS * expected)[support] ** 2 / (DRAWS * expected[support])).sum())
    freedom = int(support.sum()) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson-Hilferty
    assert chi_square < limit


@pytest.mark.parametrize("fields", [{"top_k": 300}, {"min_p": 0.5}])
def test_top_p_is_a_share_of_what_the_other_filters_keep_even_of_many_tokens(fields: dict[str, float]) -> None:
    """600 tokens that differ little: half the mass of what is kept lies within the first 256, its total does not."""
    logits = torch.linspace(0, 1, 600)
    rows = [params(temperature=1.0, top_p=0.5, seed=seed, **fields) for seed in range(DRAWS)]
    tokens = draw(logits.expand(DRAWS, -1).clone(), rows, [0] * DRAWS)
    first = int((filtered(logits, rows[0]) > 0).nonzero()[0])
    assert first <= min(tokens) < first + 5


@pytest.mark.parametrize("vocabulary", [50, 3000])
def test_a_row_gives_the_same_token_whatever_batch_it_is_in(vocabulary: int) -> None:
    """Alone, among others, and in another row; flat rows beside it need more candidates than it does."""
    logits = torch.randn(6, vocabulary) * 2
    logits[3] = 0
    rows = [
        params(temperature=0),
        params(temperature=1, seed=1),
        params(temperature=0.8, top_p=0.9, seed=2),
        params(temperature=1, top_p=0.99, seed=3),
        params(temperature=1, top_k=5, seed=4),
        params(temperature=1, min_p=0.01, seed=5),
    ]
    positions = [3, 1, 4, 1, 5, 9]
    together = draw(logits.clone(), rows, positions)
    alone = [draw(logits[i : i + 1].clone(), [rows[i]], [positions[i]])[0] for i in range(6)]
    backwards = draw(logits.flip(0).clone(), rows[::-1], positions[::-1])[::-1]
    assert together == alone == backwards


def test_uniforms_differ_by_seed_and_by_position_and_fill_the_interval() -> None:
    """10,000 of either kind: no repetition, mean of a half, inside [0, 1)."""
    many, zero = torch.arange(10_000), torch.zeros(10_000, dtype=torch.int64)
    for values in (uniforms(many, zero), uniforms(zero, many), uniforms(many + 2**62, zero)):
        assert len(values.unique()) == 10_000
        assert float(values.min()) >= 0
        assert float(values.max()) < 1
        assert abs(float(values.mean()) - 0.5) < 0.02


def test_penalties_follow_their_formulas_step_after_step() -> None:
    """Greedy, beside a row without penalties; the formula is applied to the logits by hand."""
    base = torch.randn(9, generator=torch.Generator().manual_seed(1)) * 0.5
    prompt, said = [1, 2], [4]
    row = params(temperature=0, presence_penalty=0.3, frequency_penalty=0.4, repetition_penalty=1.3)
    plain = params(temperature=0)
    states = [SamplingRow.make(row, prompt + said, 1, 9, CPU), SamplingRow.make(plain, prompt + said, 1, 9, CPU)]
    sampler = BatchSampler(states, 9, CPU)
    for position in range(1, 12):
        expected = base.clone()
        for token in range(9):
            if token in prompt + said:
                expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
            expected[token] -= 0.4 * said.count(token) + (0.3 if token in said else 0.0)
        if position == 5:  # a change of the batch keeps what was said
            sampler = BatchSampler(states, 9, CPU)
        tokens = sampler.sample(base.expand(2, -1).clone(), torch.tensor([position, position])).tolist()
        assert tokens == [int(expected.argmax()), int(base.argmax())]
        said.append(tokens[0])


def test_bias_moves_and_min_tokens_forbids() -> None:
    """Stop tokens can't be sampled before `min_tokens`; ids past the vocabulary do no harm."""
    logits = torch.zeros(1, 5)
    logits[0, 2] = 5
    assert draw(logits.clone(), [params(temperature=0, logit_bias={4: 9.0, 77: 100.0})], [0]) == [4]
    row = params(temperature=0, stop_token_ids=(2, 77), min_tokens=3)
    stopped = [draw(logits.clone(), [row], [position])[0] == 2 for position in range(5)]
    assert stopped == [False, False, False, True, True]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    """Neither temperature nor bias changes them; rows that did not ask get none."""
    logits = torch.randn(2, 7)
    rows = [params(temperature=0), params(temperature=0.1, logprobs=3, logit_bias={6: 50.0})]
    states = [SamplingRow.make(row, [], 0, 7, CPU) for row in rows]
    sampler = BatchSampler(states, 7, CPU)
    tokens = sampler.sample(logits, torch.tensor([0, 0]))
    found = sampler.logprobs(tokens, logits)
    expected = logits[1].log_softmax(0)
    assert list(found) == [1]
    assert found[1].token_id == 6
    assert found[1].logprob == pytest.approx(float(expected[6]), abs=1e-5)
    assert [token for token, _ in found[1].top] == expected.topk(3).indices.tolist()
