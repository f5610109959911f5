"""KV without a model: each page's bytes follow from the tokens up to its end, so that any wrong byte shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import xxhash

from headrace.engine.kv_cache import CacheLayout, KVCache
from headrace.kvtransfer.layout import layout_of

PAGE_SIZE = 4
NUM_LAYERS = 4
KV_HEADS = 2
HEAD_DIM = 4
CACHE_LAYOUT = CacheLayout("float32", NUM_LAYERS, KV_HEADS, HEAD_DIM, PAGE_SIZE)
PAGE_BYTES = CACHE_LAYOUT.page_bytes
VOCABULARY = 2**31 - 1
LAYOUT = layout_of("keyed", CACHE_LAYOUT, VOCABULARY)


def new_cache(num_pages: int) -> KVCache:
    """An empty KV cache in memory that other processes may map."""
    return KVCache(CACHE_LAYOUT, num_pages, torch.device("cpu"))


def fill(cache: KVCache, layer: int, page_ids: Sequence[int], keys: Sequence[bytes]) -> None:
    """Compute these pages, as a model would."""
    cache.write_pages(layer, page_ids, memoryview(b"".join(page_content(key, layer) for key in keys)))


def page_keys(token_ids: Sequence[int]) -> list[bytes]:
    """One for each page of a prompt, the last and perhaps unfinished one too: of all tokens up to its end."""
    tokens = np.asarray(token_ids, dtype=np.int32)
    keys, previous = [], b""
    for start in range(0, len(tokens), PAGE_SIZE):
        previous = xxhash.xxh3_128_digest(previous + tokens[start : start + PAGE_SIZE].tobytes())
        keys.append(previous)
    return keys


def page_content(key: bytes, layer: int) -> bytes:
    """What the page of this key holds in one layer."""
    return xxhash.xxh3_128_digest(key + bytes([layer])) * (PAGE_BYTES // 16)


def first_token(keys: Sequence[bytes]) -> int:
    """What a prefill worker samples."""
    return xxhash.xxh3_64_intdigest(keys[-1]) % VOCABULARY


def next_token(layers: Iterable[bytes | memoryview]) -> int:
    """What a decode worker samples: it depends on each byte of the prompt's KV, layer by layer."""
    digest = xxhash.xxh3_64()
    for layer in layers:
        digest.update(layer)
    return digest.intdigest() % VOCABULARY


def undisturbed(token_ids: Sequence[int]) -> list[int]:
    """Both output tokens of a prompt where nothing goes wrong."""
    keys = page_keys(token_ids)
    layers = (b"".join(page_content(key, layer) for key in keys) for layer in range(NUM_LAYERS))
    return [first_token(keys), next_token(layers)]
