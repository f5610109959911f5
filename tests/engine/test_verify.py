"""Verified drafts change nothing about the output: not its distribution, and not a single token."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from headrace.decode.ngram import NgramIndex
from headrace.engine.sampler import BatchSampler, SampledToken, SamplingRow
from headrace.engine.verify import verify
from headrace.messages.request import SamplingParams

CPU = torch.device("cpu")
VOCABULARY = 12
DRAWS = 50_000
NEXT = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(5)) * 1.5
"""A language in which each token's logits depend on the one before."""
PROMPT = [6, 2, 8, 1, 4, 9]
for _ in range(33):
    PROMPT += random.Random(len(PROMPT)).choices(range(VOCABULARY), NEXT[PROMPT[-1]].softmax(0).tolist())

Guess = Callable[[list[int]], list[int]]


@dataclass
class Request:
    """Prompt and output so far, and the sampling state."""

    params: SamplingParams
    tokens: list[int] = field(default_factory=lambda: list(PROMPT))
    scores: list[SampledToken] = field(default_factory=list)
    row: SamplingRow = field(init=False)

    def __post_init__(self) -> None:
        self.row = SamplingRow.make(self.params, self.tokens, 0, VOCABULARY, CPU)

    @property
    def output(self) -> list[int]:
        """Without the prompt."""
        return self.tokens[len(PROMPT) :]


def speak(params: Sequence[SamplingParams], length: int, guess: Guess) -> tuple[list[Request], int]:
    """At least `length` output tokens of each request, and how many drafted ones are among them."""
    requests = [Request(row) for row in params]
    accepted = 0
    while behind := [request for request in requests if len(request.output) < length]:
        generated = [len(request.output) for request in behind]
        drafts = [guess(request.tokens) for request in behind]
        before = [
            token for request, draft in zip(behind, drafts, strict=True) for token in (request.tokens[-1], *draft)
        ]
        found = verify([request.row for request in behind], generated, drafts, NEXT[before])
        for request, new in zip(behind, found, strict=True):
            accepted += len(new) - 1
            request.tokens += [token.token_id for token in new]
            request.scores += new
    return requests, accepted


def speak_plainly(params: Sequence[SamplingParams], length: int) -> list[Request]:
    """The same, one token of each request a step, as a batch without drafts does it."""
    requests = [Request(row) for row in params]
    sampler = BatchSampler([request.row for request in requests], VOCABULARY, CPU)
    for position in range(length):
        logits = NEXT[[request.tokens[-1] for request in requests]]
        tokens = sampler.sample(logits, torch.full((len(requests),), position))
        found = sampler.logprobs(tokens, logits)
        for row, (request, token) in enumerate(zip(requests, tokens.tolist(), strict=True)):
            request.tokens.append(token)
            request.scores.append(SampledToken(token, found.get(row)))
    return requests


def by_lookup(tokens: list[int]) -> list[int]:
    """What `ngram` drafts."""
    return _looked_up(tuple(tokens))


@cache
def _looked_up(tokens: tuple[int, ...]) -> list[int]:
    draft = NgramIndex(tokens).propose(3)
    return draft.token_ids if draft is not None else []


def by_chance(seed: int = 4) -> Guess:
    """A drafter that draws each token from a distribution of its own."""
    generator = random.Random(seed)
    likely = NEXT.softmax(1).tolist()

    def guess(tokens: list[int]) -> list[int]:
        draft: list[int] = []
        for _ in range(generator.randrange(4)):
            draft += generator.choices(range(VOCABULARY), likely[[*tokens, *draft][-1]])
        return draft

    return guess


def transitions(params: SamplingParams) -> torch.Tensor:
    """[V, V] float64: what follows each token, by the definition of temperature, top-k and top-p."""
    p = (NEXT / params.temperature).double().softmax(1)
    order = p.argsort(1, descending=True)
    ranked = p.gather(1, order)
    ranked[:, params.top_k :] = 0
    ranked /= ranked.sum(1, keepdim=True)
    ranked[ranked.cumsum(1) - ranked >= params.top_p] = 0
    p.scatter_(1, order, ranked / ranked.sum(1, keepdim=True))
    return p


def chi_square_limit(freedom: int) -> float:
    """What is exceeded with probability 0.001 (Wilson and Hilferty)."""
    return float(freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("guess", [by_lookup, by_chance()], ids=["ngram", "drawn drafts"])
def test_draws_with_drafts_follow_the_targets_distribution(guess: Guess, temperature: float) -> None:
    """Chi-square at p = 0.001 for 50,000 requests' tokens at each of three positions, with fixed seeds."""
    params = [
        SamplingParams(max_tokens=9, temperature=temperature, top_k=9, top_p=0.95, seed=seed) for seed in range(DRAWS)
    ]
    requests, accepted = speak(params, 3, guess)
    assert accepted > DRAWS / 4, "hardly a draft was right"
    follows = transitions(params[0])
    expected = torch.eye(VOCABULARY, dtype=torch.float64)[PROMPT[-1]]
    for position in range(3):
        expected = expected @ follows
        counts = torch.bincount(torch.tensor([r.output[position] for r in requests]), minlength=VOCABULARY).double()
        support = expected > 0
        assert not counts[~support].any(), "a token that the filters exclude was drawn"
        chi_square = float(((counts - DRAWS * expected)[support] ** 2 / (DRAWS * expected[support])).sum())
        assert chi_square < chi_square_limit(int(support.sum()) - 1), position


sampling_params = st.builds(
    SamplingParams,
    max_tokens=st.just(20),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_p=st.sampled_from([1.0, 0.9]),
    top_k=st.sampled_from([0, 5]),
    min_p=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 1000),
    presence_penalty=st.sampled_from([0.0, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([{}, {3: -100.0, 4: 2.0}]),
    stop_token_ids=st.just((2, 5)),
    min_tokens=st.sampled_from([0, 6]),
    logprobs=st.sampled_from([None, 0, 2]),
)


@given(params=st.lists(sampling_params, min_size=1, max_size=5), seed=st.integers(0, 1000))
@hypothesis_settings(max_examples=60, deadline=None)
def test_the_tokens_are_those_without_drafts(params: list[SamplingParams], seed: int) -> None:
    """For all parameters at once: penalties count drafted tokens, the end is held open by position, logprobs agree."""
    plain = speak_plainly(params, 12)
    drafted, _ = speak(params, 12, by_chance(seed))
    for one, other in zip(plain, drafted, strict=True):
        assert other.output[:12] == one.output
        for mine, theirs in zip(one.scores, other.scores, strict=False):
            assert (mine.logprobs is None) == (theirs.logprobs is None)
            if mine.logprobs is not None and theirs.logprobs is not None:
                assert theirs.logprobs.logprob == pytest.approx(mine.logprobs.logprob)
                assert [token for token, _ in theirs.logprobs.top] == [token for token, _ in mine.logprobs.top]


@pytest.mark.parametrize(("wrong", "expected"), [([], 4), ([0], 1), ([1], 2), ([2], 3), ([0, 1, 2], 1), ([1, 2], 2)])
def test_a_draft_stands_up_to_its_first_wrong_token(wrong: list[int], expected: int) -> None:
    """What is right after a wrong token was drafted after something else."""
    params = SamplingParams(max_tokens=9, temperature=0)
    (plain,) = speak_plainly([params], 4)
    draft = [(token + (at in wrong)) % VOCABULARY for at, token in enumerate(plain.output[:3])]
    logits = NEXT[[PROMPT[-1], *plain.output[:3]]]
    (tokens,) = verify([SamplingRow(params)], [0], [draft], logits)
    assert [token.token_id for token in tokens] == plain.output[:expected]


def test_counts_go_on_after_a_draft() -> None:
    """A penalized request may be verified in one step and sampled alone in the next."""
    params = SamplingParams(max_tokens=9, temperature=0, frequency_penalty=0.5)
    row = SamplingRow.make(params, PROMPT, 0, VOCABULARY, CPU)
    (plain,) = speak_plainly([params], 4)
    draft = [*plain.output[:2], 11]
    (tokens,) = verify([row], [0], [draft], NEXT[[PROMPT[-1], *draft]])
    assert [token.token_id for token in tokens] == plain.output[:3]
    sampler = BatchSampler([row], VOCABULARY, CPU)
    assert sampler.sample(NEXT[[plain.output[2]]], torch.tensor([3])).tolist() == plain.output[3:]
