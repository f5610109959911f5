"""A model whose keys and values are hashes of all tokens up to theirs, so that any wrong byte shows.

It runs in real workers. The next token depends on every byte of a request's pages in all layers, so a page that is
wrong, stale or another prompt's gives a wrong token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash

from headrace.engine.base import OnLayer
from headrace.engine.batch import ForwardBatch
from headrace.engine.engine import Engine, EngineConfig
from headrace.engine.kv_cache import CacheLayout, KVCache, PagedLayers
from headrace.engine.model_config import ModelConfig
from headrace.kernels.paged_attention import PagedPlan
from headrace.kvtransfer.layout import layout_of
from headrace.loadtest.shapes import TINY, model_folder

PAGE_SIZE = 4
NUM_LAYERS = 4
KV_HEADS = 2
HEAD_DIM = 4
CACHE_LAYOUT = CacheLayout("float32", NUM_LAYERS, KV_HEADS, HEAD_DIM, PAGE_SIZE)
PAGE_BYTES = CACHE_LAYOUT.page_bytes
TOKEN_BYTES = PAGE_BYTES // PAGE_SIZE
VOCABULARY = 2**15
LAYOUT = layout_of("keyed", CACHE_LAYOUT, VOCABULARY)
MAX_NUM_SEQS = 64
CHUNK_TOKENS = 3 * PAGE_SIZE
PREFILLS_AT_ONCE = 16


def keyed_engine(num_pages: int) -> Engine:
    """With an empty cache of so many pages in memory that other processes may map."""
    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(TINY | {"vocab_size": VOCABULARY, "num_hidden_layers": NUM_LAYERS}, Path(name))
        config = EngineConfig(folder, page_size=PAGE_SIZE, max_num_seqs=MAX_NUM_SEQS, cpu_threads=1)
        cache = KVCache(CACHE_LAYOUT, num_pages, torch.device("cpu"))
        return Engine(config, ModelConfig.from_folder(folder), KeyedModel(), cache, num_pages * PAGE_SIZE)


class KeyedModel:
    """See `Model`; a hidden state is the next token's id."""

    follows_tables = True
    prompt_tokens: int | None = None
    cache_dtype: torch.dtype | None = None
    feature_layers: tuple[int, ...] = ()
    features = torch.empty(0, 0)

    def __init__(self) -> None:
        self.accident: Callable[[], None] = lambda: None
        """Called before each layer; what it raises fails the step."""

    def forward(self, batch: ForwardBatch, cache: PagedLayers, on_layer: OnLayer | None) -> torch.Tensor:
        """See `Model`. Only a request's last token of the batch has a hidden state."""
        plan = batch.plan
        assert isinstance(plan, PagedPlan)
        tables = plan.block_table[plan.request].numpy()
        positions = batch.positions.tolist()
        rows = list(zip(tables, batch.token_ids.tolist(), positions, strict=True))
        layers = [cache.layer(layer).numpy().view(np.uint8) for layer in range(NUM_LAYERS)]
        for layer, memory in enumerate(layers):
            self.accident()
            for table, token_id, position in rows:
                before = _token(memory, table, position - 1).tobytes() if position else b""
                content = np.frombuffer(_content(before, token_id, layer), np.uint8)
                place = _token(memory, table, position)
                place[:] = content.reshape(place.shape)
            if on_layer is not None:
                on_layer(layer)
        hidden = torch.zeros(len(rows), 1, dtype=torch.float64)
        for row, request in enumerate(plan.request):
            if row + 1 == len(rows) or plan.request[row + 1] != request:
                context = positions[row] + 1
                pages = tables[row][: -(-context // PAGE_SIZE)]
                in_order = (memory[pages].transpose(0, 3, 1, 2, 4).reshape(-1, TOKEN_BYTES) for memory in layers)
                hidden[row] = _next_token([tokens[:context].tobytes() for tokens in in_order])
        return hidden if batch.wanted is None else hidden[batch.wanted]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Model`."""
        return torch.zeros(len(hidden), VOCABULARY).scatter_(1, hidden.long(), 1.0)

    def use_threads(self, threads: int) -> None:
        """See `Model`."""
        torch.set_num_threads(threads)


def _token(memory: np.ndarray, table: np.ndarray, position: int) -> np.ndarray:
    """The bytes of one token in one layer, [2, KV heads, bytes of a head]."""
    token: np.ndarray = memory[table[position // PAGE_SIZE], :, :, position % PAGE_SIZE]
    return token


def _content(before: bytes, token_id: int, layer: int) -> bytes:
    """What a token has in one layer; `before`: the same of the token before it."""
    key = before + token_id.to_bytes(4, "little") + bytes([layer])
    return xxhash.xxh3_128_digest(key) * (TOKEN_BYTES // 16)


def _next_token(layers: Sequence[bytes]) -> int:
    """After a context with these bytes in all layers."""
    digest = xxhash.xxh3_64()
    for layer in layers:
        digest.update(layer)
    return digest.intdigest() % VOCABULARY


def undisturbed(token_ids: Sequence[int], count: int = 2) -> list[int]:
    """The output tokens of a prompt where nothing goes wrong."""
    layers, last, new, found = [b""] * NUM_LAYERS, [b""] * NUM_LAYERS, list(token_ids), list[int]()
    while len(found) < count:
        for layer in range(NUM_LAYERS):
            parts = [last[layer]]
            for token_id in new:
                parts.append(_content(parts[-1], token_id, layer))
            layers[layer], last[layer] = layers[layer] + b"".join(parts[1:]), parts[-1]
        new = [_next_token(layers)]
        found += new
    return found
