"""The GPU's decode step in Triton's interpreter, against the fused decoder that every device runs."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headrace.engine import graph_decoder
from headrace.engine.batch import ForwardBatch
from headrace.engine.engine import PrefillChunk
from headrace.engine.fused_decoder import FusedDecoder
from headrace.engine.graph_batch import GraphBatch
from headrace.engine.graph_decoder import GraphDecoder, batch_sizes
from headrace.engine.kv_cache import CacheLayout, KVCache
from headrace.engine.model_config import ModelConfig, RopeConfig
from headrace.engine.prompt_rows import lay_out
from headrace.engine.sampler import SampledToken, SamplingRow
from headrace.engine.weights import DecoderWeights, LayerWeights
from headrace.kernels.linear import Linear
from headrace.kernels.paged_attention import plan_decode
from headrace.kernels.prefill_attention import plan_prefill
from headrace.messages.request import SamplingParams

HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCABULARY, LAYERS, PAGE = 48, 80, 4, 2, 16, 90, 2, 16


def config() -> ModelConfig:
    """A tiny Qwen-3-like model: norms of Q and K, biased Q, K and V."""
    rope = RopeConfig(10000.0, "default", DIM, {})
    return ModelConfig(
        "qwen3", LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCABULARY, 128, 1e-5, "float32", False, rope,
        activation="silu", norm_plus_one=False, embedding_scale=1.5, unsupported="",
    )  # fmt: skip


class PlainLinear(Linear):
    """A projection that keeps its weight as it is on any device."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight, self._bias, self._blocked = weight, bias, False


def weights(biased_qkv: bool = True) -> DecoderWeights:
    """Random ones, with folded norms."""

    def linear(out_size: int, in_size: int, biased: bool = False) -> PlainLinear:
        return PlainLinear(torch.randn(out_size, in_size) / in_size**0.5, torch.randn(out_size) if biased else None)

    layers = [
        LayerWeights(
            input_norm=torch.ones(HIDDEN),
            qkv=linear((HEADS + 2 * KV_HEADS) * DIM, HIDDEN, biased_qkv),
            q_norm=torch.rand(DIM) + 0.5,
            k_norm=torch.rand(DIM) + 0.5,
            output=linear(HIDDEN, HEADS * DIM),
            mlp_norm=torch.ones(HIDDEN),
            gate_up=linear(2 * INNER, HIDDEN),
            down=linear(HIDDEN, INNER),
        )
        for _ in range(LAYERS)
    ]
    return DecoderWeights(torch.randn(VOCABULARY, HIDDEN), layers, torch.rand(HIDDEN) + 0.5, linear(VOCABULARY, HIDDEN))


@pytest.mark.parametrize("batch", [1, 3, 70])
def test_a_step_gives_the_logits_of_the_plain_decoder(batch: int) -> None:
    """One row, a few rows and as many as take the wide path, at different lengths, one row empty."""
    torch.manual_seed(batch)
    layout = CacheLayout("float32", LAYERS, KV_HEADS, DIM, PAGE)
    cache = KVCache(layout, batch * 4 + 1, torch.device("cpu"))
    cache.pages.normal_()
    model = FusedDecoder(config(), weights(), norms_are_folded=True)
    decoder = GraphDecoder(config(), model.weights, cache, batch, 64)
    positions = torch.randint(0, 60, (batch,))
    decoder.state.tokens.copy_(torch.randint(VOCABULARY, (batch,)))
    decoder.state.positions.copy_(positions)
    decoder.block_table[:, :4] = torch.randperm(batch * 4).view(batch, 4) + 1
    table = decoder.block_table[:, :4].long()
    before = cache.pages.clone()
    got = decoder.step(batch).clone()
    after, cache.pages = cache.pages.clone(), before
    forward = ForwardBatch(
        decoder.state.tokens, positions, table.gather(1, (positions // PAGE).unsqueeze(1)).squeeze(1), positions % PAGE,
        plan_decode(cache.layer(0), table, [1] * len(positions), (positions + 1).tolist()),
    )  # fmt: skip
    expected = model.logits(model.forward(forward, cache, None))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, cache.pages, rtol=1e-4, atol=1e-4)


def test_a_step_with_drafts_gives_the_logits_of_single_steps() -> None:
    """And the cache holds what single steps would have left there."""
    torch.manual_seed(0)
    lengths = [0, 3, 1]
    requests = len(lengths)
    layout = CacheLayout("float32", LAYERS, KV_HEADS, DIM, PAGE)
    cache = KVCache(layout, requests * 5 + 1, torch.device("cpu"))
    cache.pages.normal_()
    decoder = GraphDecoder(config(), weights(), cache, requests, 80, drafts=True)
    tokens = torch.randint(VOCABULARY, (requests, 16))
    positions = torch.randint(0, 60, (requests,))
    decoder.block_table[:, :5] = torch.randperm(requests * 5).view(requests, 5) + 1
    decoder.state.tokens.copy_(tokens[:, 0])
    decoder.state.positions.copy_(positions)
    before = cache.pages.clone()
    rows = [(request, at) for request, length in enumerate(lengths) for at in range(length + 1)]
    decoder.rows.layout[:2] = -1
    decoder.rows.layout[0, : len(rows)] = torch.tensor([request for request, _ in rows])
    decoder.rows.layout[1, : len(rows)] = torch.arange(len(rows)) - torch.tensor([at for _, at in rows])
    decoder.rows.layout[2, : len(rows)] = torch.tensor([int(tokens[request, at]) for request, at in rows])
    decoder.rows.layout[3, : len(rows)] = torch.tensor([at for _, at in rows])
    got = decoder.step_drafted(len(rows)).clone()
    after = cache.pages.clone()
    cache.pages.copy_(before)
    for at in range(max(lengths) + 1):
        decoder.state.tokens.copy_(tokens[:, at])
        decoder.state.positions.copy_(torch.where(torch.tensor(lengths) >= at, positions + at, -1))
        expected = decoder.step(requests)
        for row, (request, index) in enumerate(rows):
            if index == at:
                torch.testing.assert_close(got[row], expected[request], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, cache.pages, rtol=1e-4, atol=1e-4)


def test_drafts_change_no_token() -> None:
    """Greedy and drawn tokens, penalties and log probabilities; right and wrong drafts of all lengths."""
    sampling = [
        SamplingParams(max_tokens=99, temperature=0),
        SamplingParams(max_tokens=99, temperature=0.9, top_p=0.9, seed=5, logprobs=2),
        SamplingParams(max_tokens=99, temperature=0.5, frequency_penalty=0.5, repetition_penalty=1.2, seed=6),
    ]
    plain, _ = generate(sampling, [[]] * 3)
    for penalized in (False, True):
        drafted, steps = generate(sampling[: 3 if penalized else 2], plain)
        for mine, theirs in zip(drafted, plain, strict=False):
            assert [token.token_id for token in mine] == [token.token_id for token in theirs]
            scores = [[token.logprobs.logprob for token in tokens if token.logprobs] for tokens in (mine, theirs)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-4)
        assert steps < TOKENS - 2


TOKENS = 8


def generate(sampling: list[SamplingParams], known: list[list[SampledToken]]) -> tuple[list[list[SampledToken]], int]:
    """Outputs of as many requests, and steps; with drafts from `known` outputs, every other one with a wrong token."""
    torch.manual_seed(0)
    device, rng = torch.device("cpu"), random.Random(4)
    cache = KVCache(CacheLayout("float32", LAYERS, KV_HEADS, DIM, PAGE), 16, device)
    decoder = GraphDecoder(config(), weights(), cache, 4, 64, drafts=True)
    engine: Any = SimpleNamespace(
        device=device,
        model_config=SimpleNamespace(vocab_size=VOCABULARY),
        graph_head=None,
        layout=cache.layout,
        max_model_len=64,
        sampling_row=lambda params, tokens, generated: SamplingRow.make(params, tokens, generated, VOCABULARY, device),
    )
    batch: GraphBatch[int] = GraphBatch(engine, decoder)
    outputs: list[list[SampledToken]] = [[] for _ in sampling]
    for key, params in enumerate(sampling):
        batch.join(key, [key + 7, key + 60], 1, range(3 * key + 1, 3 * key + 4), params)
    steps = 0
    while batch:
        drafts = {}
        for key, tokens in enumerate(outputs):
            draft = [token.token_id for token in known[key][len(tokens) :]][: rng.randrange(7)]
            if draft and steps % 2:
                draft[rng.randrange(len(draft))] = 0
            if draft and len(tokens) < TOKENS:
                drafts[key] = draft
        batch.start(drafts)
        steps += 1
        for key, token in batch.collect():
            outputs[key].append(token)
            if len(outputs[key]) == TOKENS:
                batch.leave(key)
    return [tokens[:TOKENS] for tokens in outputs], steps


def forward_batch(cache: KVCache, chunks: list[PrefillChunk]) -> ForwardBatch:
    """The same for the plain decoder."""
    laid_out = lay_out(chunks, PAGE)
    lengths, contexts = zip(*[(chunk.length, chunk.start + chunk.length) for chunk in chunks], strict=True)
    plan = plan_prefill(cache.layer(0), torch.from_numpy(laid_out.table), lengths, contexts, HEADS)
    rows = (laid_out.token_ids, laid_out.positions, laid_out.slot_pages, laid_out.slot_offsets)
    return ForwardBatch(*map(torch.from_numpy, rows), plan)


def some_chunks(long: int) -> list[PrefillChunk]:
    """A whole prompt, and the end of another."""
    table, tokens = (torch.randperm(14).view(2, 7) + 1).tolist(), torch.randint(VOCABULARY, (2, 96)).tolist()
    sampling = SamplingParams(max_tokens=1)
    return [
        PrefillChunk(tokens[0][:long], 0, long, table[0], sampling),
        PrefillChunk(tokens[1][:23], 16, 7, table[1], sampling),
    ]


@pytest.mark.parametrize("long", [19, 90])
@pytest.mark.parametrize("part_layers", [1, 8])
def test_a_pass_of_prompts_alone_gives_what_the_plain_decoder_does(
    long: int, part_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, the cache, and a layer's inputs for a draft head; on the narrow and on the wide path, in parts."""
    torch.manual_seed(1)
    cache = KVCache(CacheLayout("float32", LAYERS, KV_HEADS, DIM, PAGE), 16, torch.device("cpu"))
    cache.pages.normal_()
    model = FusedDecoder(config(), weights(), norms_are_folded=True)
    model.feature_layers = (1,)
    decoder = GraphDecoder(config(), model.weights, cache, 1, 96, feature_layers=(1,))
    chunks = some_chunks(long)
    before = cache.pages.clone()
    expected = model.logits(model.forward(forward_batch(cache, chunks), cache, None))[[long - 1, long + 6]]
    after, cache.pages = cache.pages.clone(), before
    assert decoder.can_share(0, chunks)
    monkeypatch.setattr(graph_decoder, "PART_LAYERS", part_layers)
    for wanted in ([0, 1], [1], []):
        layers: list[int] = []
        got = decoder.compute_prompts(chunks, wanted, layers.append)
        torch.testing.assert_close(got, expected[wanted], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cache.pages, after, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(decoder.features[: long + 7], model.features, rtol=1e-4, atol=1e-4)
        assert layers == [*range(part_layers, LAYERS), LAYERS]


def test_norms_may_come_after_projections() -> None:
    """Logits and cache are those of norms before them. With rows that are wanted, and with none."""
    torch.manual_seed(2)
    cache = KVCache(CacheLayout("float32", LAYERS, KV_HEADS, DIM, PAGE), 16, torch.device("cpu"))
    late = FusedDecoder(config(), weights(biased_qkv=False), norms_are_folded=True)
    early = FusedDecoder(config(), late.weights)
    assert (late.norms_are_late, early.norms_are_late) == (True, False)
    batch = forward_batch(cache, some_chunks(19))
    expected = early.forward(batch, cache, None)
    after = cache.pages.clone()
    for wanted in (None, torch.tensor([3, 25]), torch.tensor([], dtype=torch.int64)):
        for model in (late, early):
            cache.pages.zero_()
            got = model.forward(replace(batch, wanted=wanted), cache, None)
            torch.testing.assert_close(got, expected if wanted is None else expected[wanted], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(cache.pages, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("long", [19, 90])
def test_prompts_in_the_same_pass_change_nothing(long: int) -> None:
    """Running requests beside two prompts, one of them after a prefix: logits and the cache. The last request begins
    with the last token of that prompt.
    """
    torch.manual_seed(1)
    cache = KVCache(CacheLayout("float32", LAYERS, KV_HEADS, DIM, PAGE), 36, torch.device("cpu"))
    cache.pages.normal_()
    model = FusedDecoder(config(), weights(), norms_are_folded=True)
    decoder = GraphDecoder(config(), model.weights, cache, 5, 96)
    decoder.state.tokens.copy_(torch.tensor([5, 17, 80, 1, 2]))
    decoder.state.positions.copy_(torch.tensor([40, 0, 15, 23, -1]))
    table = torch.randperm(35).view(5, 7) + 1
    decoder.block_table[:4, :7] = table[[0, 1, 2, 4]]
    sampling = SamplingParams(max_tokens=1)
    tokens = torch.randint(VOCABULARY, (2, 96)).tolist()
    chunks = [
        PrefillChunk(tokens[0][:long], 0, long, table[3].tolist(), sampling),
        PrefillChunk(tokens[1][:23], 16, 7, table[4].tolist(), sampling),
    ]
    prompts = forward_batch(cache, chunks)
    before = cache.pages.clone()
    after_prompts = model.logits(model.forward(prompts, cache, None))[[long - 1, long + 6]]
    after_step = decoder.step(4).clone()
    after, cache.pages = cache.pages.clone(), before
    assert decoder.can_share(4, chunks)
    for wanted in ([0, 1], [1]):  # the second time, over what the first has left
        got_prompts, got_step = decoder.step_shared(4, chunks, wanted, started=lambda layers: None)
        torch.testing.assert_close(got_prompts, after_prompts[wanted], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got_step, after_step, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cache.pages, after, rtol=1e-4, atol=1e-4)


def test_captured_batch_sizes_are_dense_where_rows_are_dear() -> None:
    """Never more than a quarter of a large batch is padding."""
    sizes = batch_sizes(256)
    assert sizes[0] == 1
    assert sizes[-1] == 256
    assert all(b - a <= max(8, a // 4) for a, b in itertools.pairwise(sizes))
    assert batch_sizes(5) == [1, 2, 4, 5]
