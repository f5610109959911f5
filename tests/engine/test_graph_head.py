"""The draft head's steps on a GPU, in Triton's interpreter, against the head that every device runs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from headrace.engine.batch import ForwardBatch
from headrace.engine.draft_head import HeadWeights, TorchHead
from headrace.engine.fused_decoder import FusedDecoder
from headrace.engine.graph_batch import GraphBatch
from headrace.engine.graph_decoder import GraphDecoder
from headrace.engine.graph_head import GraphHead
from headrace.engine.kv_cache import CacheLayout, KVCache
from headrace.engine.sampler import SamplingRow
from headrace.kernels.draft_tree import CHOICES, chain, guess_at
from headrace.kernels.prefill_attention import plan_prefill
from headrace.messages.request import SamplingParams
from tests.engine.test_graph_decoder import (
    DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    PAGE,
    VOCABULARY,
    config,
    weights,
)

DRAFT_VOCABULARY = 40
FEATURE_LAYERS = (0, 1)
DEPTH = 3
PROMPTS = [[5, 80, 33], [7] * 15, list(range(3, 34))]
GREEDY = SamplingParams(max_tokens=99, temperature=0)


def head_weights() -> HeadWeights:
    """Random ones."""

    def linear(out_size: int, in_size: int) -> torch.Tensor:
        return torch.randn(out_size, in_size) / in_size**0.5

    return HeadWeights(
        FEATURE_LAYERS,
        linear(HIDDEN, len(FEATURE_LAYERS) * HIDDEN),
        torch.rand(HIDDEN) + 0.5,
        torch.rand(HIDDEN) + 0.5,
        linear((HEADS + 2 * KV_HEADS) * DIM, 2 * HIDDEN),
        linear(HIDDEN, HEADS * DIM),
        torch.rand(HIDDEN) + 0.5,
        linear(2 * INNER, HIDDEN),
        linear(HIDDEN, INNER),
        torch.rand(HIDDEN) + 0.5,
        linear(DRAFT_VOCABULARY, HIDDEN),
        torch.randperm(VOCABULARY)[:DRAFT_VOCABULARY],
    )


class Fixture:
    """A tiny model with a head, once as a GPU runs it and once in torch, each with a cache of its own."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        head_config = replace(config(), embedding_scale=1.0)
        self.model = FusedDecoder(head_config, weights(), norms_are_folded=True)
        self.model.feature_layers = FEATURE_LAYERS
        self.head = TorchHead(head_config, head_weights(), self.model.weights.embedding)
        layout = CacheLayout("float32", LAYERS + 1, KV_HEADS, DIM, PAGE)
        self.cache, self.own_cache = (KVCache(layout, 24, torch.device("cpu")) for _ in range(2))
        self.decoder = GraphDecoder(
            head_config, self.model.weights, self.cache, 4, 96, drafts=True, feature_layers=FEATURE_LAYERS
        )
        folded = self.head.weights.folded()
        self.graph_head = GraphHead(head_config, folded, self.model.weights.embedding, self.decoder)

        def sampling_row(params: SamplingParams, tokens: Any, generated: int) -> SamplingRow:
            return SamplingRow.make(params, tokens, generated, VOCABULARY, torch.device("cpu"))

        engine: Any = SimpleNamespace(
            device=torch.device("cpu"),
            model_config=SimpleNamespace(vocab_size=VOCABULARY),
            sampling_row=sampling_row,
            graph_head=self.graph_head,
            layout=layout,
            cache=self.cache,
            max_model_len=96,
        )
        self.batch: GraphBatch[int] = GraphBatch(engine, self.decoder)

    def read(self, cache: KVCache, tokens: list[int], pages: list[int], start: int = 0) -> torch.Tensor:
        """The logits behind a sequence, and its features."""
        return self.model.forward(self._pack(cache, tokens, pages, start), cache, None)

    def _pack(self, cache: KVCache, tokens: list[int], pages: list[int], start: int) -> ForwardBatch:
        table, at = torch.tensor([pages]), torch.arange(start, len(tokens))
        plan = plan_prefill(cache.layer(0), table, [len(at)], [len(tokens)], HEADS)
        return ForwardBatch(torch.tensor(tokens[start:]), at, table[0, at // PAGE], at % PAGE, plan)

    def read_prompt(self, tokens: list[int], pages: list[int]) -> int:
        """As a prefill does: K and V of model and head of all tokens; returns the next one."""
        hidden = self.read(self.cache, tokens, pages)
        first = int(self.model.logits(hidden[-1:]).argmax())
        batch = replace(self._pack(self.cache, tokens, pages, 0), token_ids=torch.tensor([*tokens[1:], first]))
        self.head.forward(self.head.fuse(self.model.features), batch, self.cache)
        return first

    def follow(self, tokens: list[int], count: int) -> list[int]:
        """The likeliest continuation, by torch from nothing."""
        found: list[int] = []
        for _ in range(count):
            hidden = self.read(self.own_cache, [*tokens, *found], list(range(6)))
            found.append(int(self.model.logits(hidden[-1:]).argmax()))
        return found

    def guesses(self, tokens: list[int], depth: int) -> list[int]:
        """What the head guesses behind a sequence, by torch from nothing."""
        pages = list(range(6))
        self.read(self.own_cache, tokens[:-1], pages)
        batch = replace(self._pack(self.own_cache, tokens[:-1], pages, 0), token_ids=torch.tensor(tokens[1:]))
        states = self.head.forward(self.head.fuse(self.model.features), batch, self.own_cache)[-1:]
        found: list[int] = []
        while True:
            found += self.head.draft(states)[0].tolist()
            if len(found) == depth:
                return found
            known = [*tokens, *found]
            packed = self._pack(self.own_cache, known[:-1], pages, len(known) - 2)
            states = self.head.forward(states, replace(packed, token_ids=torch.tensor(known[-1:])), self.own_cache)


def test_guesses_are_those_of_torch() -> None:
    """Step after step, behind drafts that stand and drafts that don't, for requests of different lengths."""
    fixture = Fixture()
    batch, sequences = fixture.batch, []
    for key, prompt in enumerate(PROMPTS):
        pages = list(range(1 + 5 * key, 6 + 5 * key))
        sequences.append([*prompt, fixture.read_prompt(prompt, pages)])
        batch.join(key, sequences[key], 1, pages, GREEDY)
    wrong = True
    for step in range(5):
        drafts = {key: [3] * step for key in range(step % 4)}
        if step == 3:  # the right one
            drafts[0] = [*fixture.follow(sequences[0], 1), 1]
        batch.start({key: draft for key, draft in drafts.items() if draft}, DEPTH)
        made = batch.collect()
        for key, token in made:
            sequences[key].append(token.token_id)
        wrong = wrong and len(made) == len(PROMPTS)
        for key, sequence in enumerate(sequences):
            guesses = fixture.decoder.state.guesses[key, : DEPTH * CHOICES : CHOICES].tolist()
            assert guesses == fixture.guesses(sequence, DEPTH)
    assert not wrong, "no draft stood"


def test_a_leaf_that_stands_leaves_what_a_chain_would() -> None:
    """Steps and guesses behind it find its keys and values where its position is."""
    fixture = Fixture()
    batch, guesses, sequences = fixture.batch, fixture.decoder.state.guesses, []
    for key, prompt in enumerate(PROMPTS[:2]):
        pages = list(range(1 + 5 * key, 6 + 5 * key))
        sequences.append([*prompt, fixture.read_prompt(prompt, pages)])
        batch.join(key, sequences[key], 1, pages, GREEDY)
    batch.start({}, DEPTH)
    for key, token in batch.collect():
        sequences[key].append(token.token_id)
    for _ in range(3):
        first, second = (fixture.follow(sequence, 2) for sequence in sequences)
        guesses[0, : 2 * CHOICES] = torch.tensor([first[0] - 1, first[0] + 1, first[0], 1, 1, 1])
        guesses[1, : 2 * CHOICES] = torch.tensor([second[0], 1, 1, second[1] + 1, second[1], 1])
        drafts = {0: [*chain(2), guess_at(0, 1), guess_at(0, 2)], 1: [*chain(2), guess_at(0, 1), guess_at(1, 1)]}
        batch.start(drafts, DEPTH)
        made: list[list[int]] = [[], []]
        for key, token in batch.collect():
            made[key].append(token.token_id)
        for key, length in enumerate((2, 3)):
            assert made[key] == fixture.follow(sequences[key], length)
            sequences[key] += made[key]
            assert guesses[key, : DEPTH * CHOICES : CHOICES].tolist() == fixture.guesses(sequences[key], DEPTH)


def test_outputs_are_those_without_drafts() -> None:
    """With a step in flight whose drafts nobody has seen, and penalties, which need to be seen."""
    sampling = [GREEDY, SamplingParams(max_tokens=99, temperature=0.8, seed=4), replace_penalty(GREEDY)]
    outputs = []
    for depth in (0, DEPTH):
        fixture = Fixture()
        batch = fixture.batch
        found: list[list[int]] = [[] for _ in PROMPTS]
        for key, prompt in enumerate(PROMPTS):
            pages = list(range(1 + 5 * key, 6 + 5 * key))
            batch.join(key, [*prompt, fixture.read_prompt(prompt, pages)], 1, pages, sampling[key])
        verified = 0
        while min(map(len, found)) < 6:
            batch.start({key: [*chain(2), guess_at(0, 1), guess_at(1, 2)] for key in range(3)} if depth else {}, depth)
            if batch.in_flight > batch.lookahead:
                for key, token in batch.collect():
                    found[key].append(token.token_id)
                verified += sum(len(one.draft) for one in batch.verified.values())
                assert 2 not in batch.verified
        outputs.append([tokens[:6] for tokens in found])
    assert verified > 0
    assert outputs[0] == outputs[1]


def replace_penalty(params: SamplingParams) -> SamplingParams:
    """The same, penalized."""
    return SamplingParams(max_tokens=params.max_tokens, temperature=params.temperature, frequency_penalty=1.5)


def test_a_guess_stays_within_a_requests_pages() -> None:
    """Behind the last one it has, nothing is written to anybody's."""
    fixture = Fixture()
    prompt = list(range(3, 3 + PAGE - 2))
    batch, pages = fixture.batch, [9]
    first = fixture.read_prompt(prompt, pages)
    others = [page for page in range(24) if page not in pages]
    before = fixture.cache.pages[:, others].clone()
    batch.join(0, [*prompt, first], 1, pages, GREEDY)
    for _ in range(2):
        batch.start({}, DEPTH)
        batch.collect()
    assert torch.equal(fixture.cache.pages[:, others], before)
