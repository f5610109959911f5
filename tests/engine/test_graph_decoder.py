"""The GPU's decode step in Triton's interpreter, against the fused decoder that every device runs."""

from __future__ import annotations

import itertools

import pytest
import torch

from headrace.engine.batch import ForwardBatch
from headrace.engine.fused_decoder import FusedDecoder
from headrace.engine.graph_decoder import GraphDecoder, batch_sizes
from headrace.engine.kv_cache import CacheLayout, KVCache
from headrace.engine.model_config import ModelConfig, RopeConfig
from headrace.engine.parallel import ParallelGroup
from headrace.engine.weights import DecoderWeights, LayerWeights
from headrace.kernels.linear import Linear
from headrace.kernels.paged_attention import plan_decode
from headrace.kernels.prefill_attention import plan_prefill

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


def weights() -> DecoderWeights:
    """Random ones, with folded norms."""

    def linear(out_size: int, in_size: int, biased: bool = False) -> PlainLinear:
        return PlainLinear(torch.randn(out_size, in_size) / in_size**0.5, torch.randn(out_size) if biased else None)

    layers = [
        LayerWeights(
            input_norm=torch.ones(HIDDEN),
            qkv=linear((HEADS + 2 * KV_HEADS) * DIM, HIDDEN, biased=True),
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
    model = FusedDecoder(config(), weights(), ParallelGroup(), norms_are_folded=True)
    decoder = GraphDecoder(config(), model.weights, cache, batch, 64)
    positions = torch.randint(0, 60, (batch,))
    decoder.tokens.copy_(torch.randint(VOCABULARY, (batch,)))
    decoder.positions.copy_(positions)
    decoder.block_table[:, :4] = torch.randperm(batch * 4).view(batch, 4) + 1
    table = decoder.block_table[:, :4].long()
    before = cache.pages.clone()
    got = decoder.step(batch).clone()
    after, cache.pages = cache.pages.clone(), before
    forward = ForwardBatch(
        decoder.tokens, positions, table.gather(1, (positions // PAGE).unsqueeze(1)).squeeze(1), positions % PAGE,
        plan_decode(cache.layer(0), table, (positions + 1).tolist()),
    )  # fmt: skip
    expected = model.logits(model.forward(forward, cache, None))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, cache.pages, rtol=1e-4, atol=1e-4)


def test_prompts_in_the_same_pass_change_nothing() -> None:
    """Three running requests beside two prompts, one of them after a prefix: hidden states and the cache."""
    torch.manual_seed(1)
    layout = CacheLayout("float32", LAYERS, KV_HEADS, DIM, PAGE)
    cache = KVCache(layout, 21, torch.device("cpu"))
    cache.pages.normal_()
    model = FusedDecoder(config(), weights(), ParallelGroup(), norms_are_folded=True)
    decoder = GraphDecoder(config(), model.weights, cache, 3, 64)
    decoder.tokens.copy_(torch.tensor([5, 17, 80]))
    decoder.positions.copy_(torch.tensor([40, 0, 15]))
    table = torch.randperm(20).view(5, 4) + 1
    decoder.block_table[:, :4] = table[:3]
    lengths, contexts = [19, 7], [19, 23]
    positions = torch.cat([torch.arange(end - length, end) for length, end in zip(lengths, contexts, strict=True)])
    rows = torch.tensor([3] * 19 + [4] * 7)
    plan = plan_prefill(cache.layer(0), table[3:], lengths, contexts, HEADS)
    pages, offsets = table[rows, positions // PAGE], positions % PAGE
    prompts = ForwardBatch(torch.randint(VOCABULARY, (26,)), positions, pages, offsets, plan)
    before = cache.pages.clone()
    expected = model.logits(model.forward(prompts, cache, None)), decoder.step(3).clone()
    after, cache.pages = cache.pages.clone(), before
    layers: list[int] = []
    got = model.logits(model.forward(prompts, cache, layers.append, decoder.running(3)))
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.pages, after, rtol=1e-4, atol=1e-4)
    assert layers == [0, 1]


def test_captured_batch_sizes_are_dense_where_rows_are_dear() -> None:
    """Never more than a quarter of a large batch is padding."""
    sizes = batch_sizes(256)
    assert sizes[0] == 1
    assert sizes[-1] == 256
    assert all(b - a <= max(8, a // 4) for a, b in itertools.pairwise(sizes))
    assert batch_sizes(5) == [1, 2, 4, 5]
