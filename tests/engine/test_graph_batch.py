"""The rows of a batch whose tokens only the device knows: joins, leaves and pages between steps in flight."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headrace.engine.graph_batch import GraphBatch
from headrace.engine.sampler import SamplingRow
from headrace.messages.request import SamplingParams

VOCABULARY, CAPACITY, WIDTH, PAGE = 97, 5, 6, 4


class SumDecoder:
    """Its next token is a function of the token, its position and the page that it goes to."""

    def __init__(self) -> None:
        self.tokens = torch.zeros(CAPACITY, dtype=torch.int64)
        self.positions = torch.full((CAPACITY,), -1, dtype=torch.int32)
        self.block_table = torch.zeros(CAPACITY, WIDTH, dtype=torch.int32)

    def step(self, rows: int) -> torch.Tensor:
        """One row after the other."""
        assert (self.positions[:rows] >= 0).all()
        assert (self.positions[rows:] == -1).all()
        logits = torch.zeros(rows, VOCABULARY)
        for row in range(rows):
            position = int(self.positions[row])
            page = int(self.block_table[row, position // PAGE])
            logits[row, following(int(self.tokens[row]), position, page)] = 1.0
        return logits


def following(token: int, position: int, page: int) -> int:
    """What comes after a token."""
    return (31 * token + 7 * position + page) % VOCABULARY


def make_batch() -> GraphBatch[int]:
    """A batch whose engine is no more than it needs."""
    device = torch.device("cpu")

    def sampling_row(params: SamplingParams, tokens: Any, generated: int) -> SamplingRow:
        return SamplingRow.make(params, tokens, generated, VOCABULARY, device)

    engine: Any = SimpleNamespace(
        device=device, model_config=SimpleNamespace(vocab_size=VOCABULARY), sampling_row=sampling_row
    )
    decoder: Any = SumDecoder()
    return GraphBatch(engine, decoder)


def collect(batch: GraphBatch[int], left: int, got: dict[int, list[int]]) -> None:
    """Collect steps until so many are left in flight."""
    while batch.in_flight > left:
        for key, token in batch.collect():
            got[key].append(token.token_id)


@pytest.mark.parametrize("seed", range(8))
def test_every_request_gets_its_own_tokens(seed: int) -> None:
    """Requests join, get pages and leave at random, with one step in flight, and each sees only its own state."""
    rng = random.Random(seed)
    batch = make_batch()
    running: dict[int, tuple[list[int], list[int]]] = {}
    expected: dict[int, list[int]] = {}
    got: dict[int, list[int]] = {}
    for key in range(60):
        for leaver in [k for k in running if rng.random() < 0.2]:
            batch.leave(leaver)
            del running[leaver]
        if len(running) < CAPACITY:
            tokens, pages = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9))], []
            while len(pages) * PAGE < len(tokens):
                pages.append(rng.randrange(1000))
            batch.join(key, tokens, 1, pages, SamplingParams(max_tokens=9, temperature=0))
            running[key], expected[key], got[key] = (list(tokens), list(pages)), [], []
        for k, (tokens, pages) in running.items():
            if len(tokens) > len(pages) * PAGE:
                pages.append(rng.randrange(1000))
                batch.add_pages(k, pages[-1:])
            position = len(tokens) - 1
            tokens.append(following(tokens[-1], position, pages[position // PAGE]))
            expected[k].append(tokens[-1])
        for k in [k for k, (tokens, _) in running.items() if len(tokens) >= WIDTH * PAGE]:
            batch.leave(k)
            expected[k].pop()
            del running[k]
        if len(batch):
            batch.start()
        collect(batch, batch.lookahead, got)
    collect(batch, 0, got)
    assert got == expected
