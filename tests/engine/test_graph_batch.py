"""The rows of a batch whose tokens only the device knows: joins, leaves and pages between steps in flight."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headrace.engine import graph_batch
from headrace.engine.graph_batch import GraphBatch
from headrace.engine.sampler import SamplingRow
from headrace.kernels.draft_rows import RequestState, StepRows
from headrace.kernels.draft_tree import CHOICES, chain, guess_at
from headrace.messages.request import SamplingParams
from tests.engine.every_third import EveryThird
from tests.kernels.references import accept_rows_reference, expand_rows_reference

VOCABULARY, CAPACITY, WIDTH, PAGE = 97, 5, 6, 4


class SumDecoder:
    """Its next token is a function of the token, its position and the page that it goes to."""

    def __init__(self) -> None:
        self.state = RequestState.empty(CAPACITY, 4, torch.device("cpu"))
        self.rows = StepRows(CAPACITY * 5, torch.device("cpu"))
        self.block_table = torch.zeros(CAPACITY, WIDTH, dtype=torch.int32)
        self.limits = torch.zeros(CAPACITY, dtype=torch.int32)

    def step(self, rows: int) -> torch.Tensor:
        """One row after the other."""
        assert (self.state.positions[rows:] == -1).all()
        return self._logits(list(range(rows)), self.state.tokens, self.state.positions)

    def step_drafted(self, rows: int) -> torch.Tensor:
        """The same where rows are not requests."""
        expand_rows_reference(self.state, self.rows)
        assert (self.rows.positions[rows:] == -1).all()
        return self._logits(self.rows.drafted.owners[:rows].tolist(), self.rows.tokens, self.rows.positions)

    def _logits(self, owners: list[int], tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        assert (positions[: len(owners)] >= 0).all()
        logits = torch.zeros(len(owners), VOCABULARY)
        for row, owner in enumerate(owners):
            position = int(positions[row])
            page = int(self.block_table[owner, position // PAGE])
            logits[row, following(int(tokens[row]), position, page)] = 1.0
        self.logits = logits
        return logits


def following(token: int, position: int, page: int) -> int:
    """What comes after a token."""
    return (31 * token + 7 * position + page) % VOCABULARY


class SumHead:
    """A head that knows what comes, and says something else now and then."""

    max_requests = CAPACITY

    def __init__(self, decoder: SumDecoder, rng: random.Random) -> None:
        self._decoder = decoder
        self._rng = rng

    def read(self, rows: int, report: int, *, is_greedy: bool = False) -> None:
        """It needs no features."""
        step = self._decoder.rows
        if is_greedy:
            step.sampled[:rows] = self._decoder.logits.argmax(-1)
        accept_rows_reference(step.sampled[:rows], step, self._decoder.state, step.reports[report][:rows])

    def guess(self, requests: int, depth: int) -> None:
        """From each request's newest token on."""
        state = self._decoder.state
        for request in range(requests):
            token, position = int(state.tokens[request]), int(state.positions[request])
            for at in range(depth):
                if position + at >= int(self._decoder.limits[request]):
                    break
                page = int(self._decoder.block_table[request, (position + at) // PAGE])
                token = following(token, position + at, page)
                place = self._rng.choice((0, 0, 0, 1, CHOICES))
                for choice in range(CHOICES):
                    state.guesses[request, at * CHOICES + choice] = token if choice == place else VOCABULARY - 1


def make_batch(guesses: random.Random | None = None) -> GraphBatch[int]:
    """A batch whose engine is no more than it needs."""
    device = torch.device("cpu")

    def sampling_row(params: SamplingParams, tokens: Any, generated: int) -> SamplingRow:
        return SamplingRow.make(params, tokens, generated, VOCABULARY, device)

    decoder: Any = SumDecoder()
    engine: Any = SimpleNamespace(
        device=device,
        model_config=SimpleNamespace(vocab_size=VOCABULARY),
        sampling_row=sampling_row,
        cache=SimpleNamespace(pages=None),
        graph_head=None if guesses is None else SumHead(decoder, guesses),
        layout=SimpleNamespace(page_size=PAGE),
        max_model_len=WIDTH * PAGE,
    )
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


def constrained(prompt: list[int], first: int, pages: list[int], tokens: int) -> list[int]:
    """What `SumDecoder` says under `EveryThird`, after the first token."""
    known = [*prompt, first]
    for place in range(1, tokens):
        position = len(known) - 1
        token = following(known[-1], position, pages[position // PAGE])
        known.append(token if token % 3 == place % 3 else place % 3)  # the first of those that are left
    return known[len(prompt) + 1 :]


@pytest.mark.parametrize("drafts_of", ["nobody", "host", "device"])
@pytest.mark.parametrize("seed", range(4))
def test_requests_with_a_grammar_run_ahead_among_others(
    seed: int, drafts_of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each mask follows all tokens before it, those of the step in flight and of the draft among them."""
    monkeypatch.setattr(graph_batch, "accept_rows", accept_rows_reference)
    monkeypatch.setattr(graph_batch, "move_leaf", lambda *args: None)  # it has no keys and values
    rng = random.Random(seed)
    batch, tokens, verified = make_batch(rng), 12, set[int]()
    expected: dict[int, list[int]] = {}
    got: dict[int, list[int]] = {}
    sampling = SamplingParams(max_tokens=tokens, temperature=0)
    for key in range(CAPACITY):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 5))]
        pages, first, got[key] = [rng.randrange(1000) for _ in range(WIDTH)], 3 * rng.randrange(30), []
        matcher: Any = EveryThird() if key % 2 else None
        batch.join(key, [*prompt, first], 1, pages, sampling, matcher)
        if matcher is None:
            expected[key] = true_draft([*prompt, first], pages, tokens - 1)
        else:
            expected[key] = constrained(prompt, first, pages, tokens)
    while running := [key for key in got if len(got[key]) < tokens - 1]:
        if drafts_of == "device" and rng.random() < 0.8:
            draft = [*chain(rng.randint(1, 3)), *([guess_at(0, 1)] if rng.random() < 0.5 else [])]
            batch.start(dict.fromkeys(running, draft), rng.choice((0, 3, 3)))
            collect(batch, batch.lookahead, got)
            verified |= {key for key, one in batch.verified.items() if one.draft}
        elif drafts_of == "host" and rng.random() < 0.6:
            collect(batch, 0, got)
            drafts = {}
            for key in running:
                draft = expected[key][len(got[key]) :][: rng.randrange(4)]
                if draft and rng.random() < 0.3:
                    draft[rng.randrange(len(draft))] += 1
                if draft:
                    drafts[key] = draft
            batch.start(drafts)
            collect(batch, 0, got)
        else:
            batch.start()
            collect(batch, batch.lookahead, got)
        for key in [key for key in got if len(got[key]) >= tokens - 1 and key in batch._row_of]:
            batch.leave(key)
    assert {key: own[: tokens - 1] for key, own in got.items()} == expected
    assert not any(key % 2 for key in verified), "nobody knew what their masks were to follow"
    assert verified or drafts_of != "device"


def true_draft(tokens: list[int], pages: list[int], length: int) -> list[int]:
    """What will come, as far as there are pages."""
    known = list(tokens)
    while len(known) - len(tokens) < length and len(known) <= len(pages) * PAGE:
        known.append(following(known[-1], len(known) - 1, pages[(len(known) - 1) // PAGE]))
    return known[len(tokens) :]


@pytest.mark.parametrize("seed", range(8))
def test_drafts_that_stand_give_the_tokens_to_come(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps with drafts, right up to some token, between steps without that are collected late."""
    monkeypatch.setattr(graph_batch, "accept_rows", accept_rows_reference)  # which the interpreter is slow at
    rng = random.Random(seed)
    batch = make_batch()
    running: dict[int, tuple[list[int], list[int]]] = {}
    got: dict[int, list[int]] = {}
    steps = 0
    for key in range(40):
        collect(batch, 0, got)
        for k, (tokens, pages) in list(running.items()):
            expected = true_draft(tokens, pages, len(got[k]))
            assert got[k] == expected
            tokens += got[k]
            got[k] = []
            if len(tokens) > (WIDTH - 2) * PAGE or rng.random() < 0.1:
                batch.leave(k)
                del running[k]
        if len(running) < CAPACITY:
            prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9))]
            own = [rng.randrange(1000) for _ in range(WIDTH)]
            batch.join(key, prompt, 1, own, SamplingParams(max_tokens=9, temperature=0))
            running[key], got[key] = (prompt, own), []
        drafts = {}
        for k, (tokens, pages) in running.items():
            draft = true_draft(tokens, pages, rng.randrange(4))
            if draft and rng.random() < 0.5:
                draft[rng.randrange(len(draft))] += 1
            if draft:
                drafts[k] = draft
        if drafts and rng.random() < 0.7:
            batch.start(drafts)
            steps += 1
        else:
            batch.start()
            batch.start()
    assert steps > 10


@pytest.mark.parametrize("seed", range(8))
def test_guesses_of_the_device_are_verified_before_the_host_has_seen_them(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests join and leave with a step in flight, of which nobody knows how many tokens it makes."""
    monkeypatch.setattr(graph_batch, "accept_rows", accept_rows_reference)
    monkeypatch.setattr(graph_batch, "move_leaf", lambda *_: None)  # there is no cache
    rng = random.Random(seed)
    batch = make_batch(rng)
    running: dict[int, tuple[list[int], list[int]]] = {}
    got: dict[int, list[int]] = {}
    steps = drafted = 0
    for key in range(60):
        for k in [k for k, (prompt, _) in running.items() if len(prompt) + len(got[k]) > 14 or rng.random() < 0.1]:
            batch.leave(k)
            prompt, pages = running.pop(k)
            assert got[k] == true_draft(prompt, pages, len(got[k]))
        if len(running) < CAPACITY and rng.random() < 0.7:
            prompt, own = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9))], []
            own = [rng.randrange(1000) for _ in range(WIDTH)]
            batch.join(key, prompt, 1, own, SamplingParams(max_tokens=99, temperature=0))
            running[key], got[key] = (prompt, own), []
        if not running:
            continue
        leaves = [guess_at(0, 1)] if rng.random() < 0.5 else []
        # also of requests for which nothing was guessed: then there is no draft
        drafts = {k: [*chain(rng.randint(1, 3)), *leaves] for k in running if rng.random() < 0.8}
        batch.start(drafts, rng.choice((0, 3, 3, 3)))
        if batch.in_flight > batch.lookahead:
            steps += 1
            for k, token in batch.collect():
                got[k].append(token.token_id)
            drafted += sum(len(one.draft) for one in batch.verified.values())
    for k, (prompt, pages) in running.items():
        assert got[k] == true_draft(prompt, pages, len(got[k]))
    assert steps > 30
    assert drafted > 30
