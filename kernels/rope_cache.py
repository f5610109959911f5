"""From packed projections to attention's inputs in one kernel: norms of Q and K, rotation, and the write to the cache.

The rotation is `rope.py`'s (arXiv:2104.09864, the half-split form of Hugging Face checkpoints), in float32 until the
result is stored.
"""

from __future__ import annotations

import torch

from headrace.kernels.cache_write import write_cache
from headrace.kernels.launch import power_of_two
from headrace.kernels.launcher import Launcher
from headrace.kernels.optional_triton import tl, triton
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.rope import RopeTables

FLOAT8_MAX = 448.0
"""The largest float8_e4m3fn."""
MANY_TOKENS = 512
"""From here on a program takes more heads: there are programs enough."""


def rope_cache(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rope: RopeTables,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    layer_pages: torch.Tensor,
    slot_pages: torch.Tensor,
    slot_offsets: torch.Tensor,
    keep_keys: bool = False,
    cache_scales: tuple[float, float] = (1.0, 1.0),
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalize and rotate queries and keys, write keys and values to the cache; returns queries [T, heads, head_dim].

    qkv [T, (heads + 2 kv_heads) * head_dim] as projected; positions [T] are rows of `rope`; norms: weights [head_dim]
    of the RMS norms of Q and K (Qwen 3); layer_pages [pages, 2, kv_heads, page_size, head_dim], whose float8_e4m3fn
    holds K and V divided by `cache_scales`; slots [T] int64, of which negative pages are not written. `keep_keys` puts
    the rotated keys into qkv, too, for attention that reads them there: and the values, where there are `factors`,
    float32 [T], by which the rows of qkv are multiplied before all else.
    """
    run = _launch if qkv.is_cuda else rope_cache_reference
    return run(
        qkv, positions, rope, norms, eps, layer_pages, slot_pages, slot_offsets, keep_keys, cache_scales, factors
    )  # fmt: skip


def rope_cache_reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rope: RopeTables,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    layer_pages: torch.Tensor,
    slot_pages: torch.Tensor,
    slot_offsets: torch.Tensor,
    keep_keys: bool,
    cache_scales: tuple[float, float],
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch."""
    _, _, kv_heads, _, head_dim = layer_pages.shape
    by_head = qkv.view(qkv.shape[0], qkv.shape[1] // head_dim, head_dim)
    heads = by_head.shape[1] - 2 * kv_heads
    wide = by_head.float() if factors is None else by_head.float() * factors.view(-1, 1, 1)
    queries, keys, values = wide.tensor_split((heads, heads + kv_heads), dim=1)
    if norms is not None:
        queries, keys = (rms_norm(x, norm.float(), eps) for x, norm in zip((queries, keys), norms, strict=True))
    queries, keys = (_rotate(x, rope, positions).to(qkv.dtype) for x in (queries, keys))
    if keep_keys:
        by_head[:, heads : heads + kv_heads] = keys
        if factors is not None:
            by_head[:, heads + kv_heads :] = values
    there = slot_pages >= 0
    cached_keys = _to_cache(keys[there], cache_scales[0], layer_pages.dtype)
    cached_values = _to_cache(values[there].to(qkv.dtype), cache_scales[1], layer_pages.dtype)
    write_cache(cached_keys, cached_values, layer_pages, slot_pages[there], slot_offsets[there])
    return queries


def _to_cache(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    return (x.float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(dtype) if dtype.itemsize == 1 else x.to(dtype)


def _rotate(x: torch.Tensor, rope: RopeTables, positions: torch.Tensor) -> torch.Tensor:
    cos, sin = rope.cos[positions].unsqueeze(1), rope.sin[positions].unsqueeze(1)
    half = cos.shape[-1]
    first, second, rest = x.tensor_split((half, 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _launch(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rope: RopeTables,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    layer_pages: torch.Tensor,
    slot_pages: torch.Tensor,
    slot_offsets: torch.Tensor,
    keep_keys: bool,
    cache_scales: tuple[float, float],
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    _, _, kv_heads, page_size, head_dim = layer_pages.shape
    tokens, rotary_half = qkv.shape[0], rope.cos.shape[1]
    all_heads = qkv.shape[1] // head_dim
    heads = all_heads - 2 * kv_heads
    queries = qkv.new_empty(tokens, heads, head_dim)
    if tokens == 0:
        return queries
    block = 8 if tokens < MANY_TOKENS else 16
    rest = head_dim - 2 * rotary_half
    q_norm, k_norm = norms if norms is not None else (None, None)
    _launch_rope_cache(
        (tokens, -(-all_heads // block), 1),
        (
            qkv, factors, positions, rope.cos, rope.sin, q_norm, k_norm, queries, layer_pages, slot_pages,
            slot_offsets, eps, 1 / cache_scales[0], 1 / cache_scales[1],
        ),
        (
            qkv.stride(0), layer_pages.stride(0), heads, kv_heads, head_dim, rotary_half, power_of_two(rotary_half),
            rest, power_of_two(max(rest, 1)), page_size, block, keep_keys, layer_pages.dtype.itemsize == 1, FLOAT8_MAX,
        ),
        num_warps=4,
    )  # fmt: skip
    return queries


@triton.jit
def _store(
    x, d, there, is_query, is_kept, is_key_or_value, q_out, kv_out, page_out, inverse_scale, is_cached,
    KEEP_KEYS: tl.constexpr, FLOAT8: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """Some dimensions `d` (where they are `there`) of all heads to where each kind of head belongs."""
    rounded = x.to(q_out.dtype.element_ty)
    tl.store(q_out + d, rounded, mask=is_query & there)
    if KEEP_KEYS:
        tl.store(kv_out + d, rounded, mask=is_kept & there)
    cached = tl.minimum(tl.maximum(rounded.to(tl.float32) * inverse_scale, -MAX), MAX) if FLOAT8 else rounded
    tl.store(page_out + d, cached.to(page_out.dtype.element_ty), mask=is_key_or_value & there & is_cached)


@triton.jit
def _weights(q_norm_ptr, k_norm_ptr, is_query, d, mask):
    q_norm = tl.load(q_norm_ptr + d, mask=mask, other=0.0).to(tl.float32)
    k_norm = tl.load(k_norm_ptr + d, mask=mask, other=0.0).to(tl.float32)
    return tl.where(is_query, q_norm, k_norm)


@triton.jit
def _rope_cache_kernel(
    qkv_ptr, factors_ptr, positions_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, queries_ptr, pages_ptr,
    slot_pages_ptr, slot_offsets_ptr, eps, inverse_key_scale, inverse_value_scale,
    QKV_STRIDE: tl.constexpr, PAGE_STRIDE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    DIM: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST: tl.constexpr, REST_PADDED: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, KEEP_KEYS: tl.constexpr, FLOAT8: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """BLOCK heads of one token; a head is its first and second rotated half, and the rest."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
    is_query = head < HEADS
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    kv_head = tl.where(is_key, head - HEADS, head - HEADS - KV_HEADS)
    h = tl.arange(0, HALF_PADDED)[None, :]
    r = tl.arange(0, REST_PADDED)[None, :]
    exists = head < HEADS + 2 * KV_HEADS
    in_half = h < HALF
    position = tl.load(positions_ptr + token).to(tl.int64)
    page = tl.load(slot_pages_ptr + token).to(tl.int64)
    offset = tl.load(slot_offsets_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + h, mask=in_half, other=1.0)
    sin = tl.load(sin_ptr + position * HALF + h, mask=in_half, other=0.0)
    # all loads below are of what the kernel ahead has made
    source = qkv_ptr + token * QKV_STRIDE + head * DIM
    first = tl.load(source + h, mask=exists & in_half, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + h, mask=exists & in_half, other=0.0).to(tl.float32)
    if REST > 0:
        rest = tl.load(source + 2 * HALF + r, mask=exists & (r < REST), other=0.0).to(tl.float32)
    is_kept = is_key
    if factors_ptr is not None:
        is_kept = is_key | is_value
        factor = tl.load(factors_ptr + token)
        first, second = first * factor, second * factor
        if REST > 0:
            rest = rest * factor
    if q_norm_ptr is not None:
        squares = tl.sum(first * first + second * second, 1)
        if REST > 0:
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / DIM + eps)[:, None]
        first_weight = scale * _weights(q_norm_ptr, k_norm_ptr, is_query, h, in_half)
        second_weight = scale * _weights(q_norm_ptr, k_norm_ptr, is_query, HALF + h, in_half)
        first = tl.where(is_value, first, first * first_weight)
        second = tl.where(is_value, second, second * second_weight)
        if REST > 0:
            rest_weight = scale * _weights(q_norm_ptr, k_norm_ptr, is_query, 2 * HALF + r, r < REST)
            rest = tl.where(is_value, rest, rest * rest_weight)
    turned_first = tl.where(is_value, first, first * cos - second * sin)
    turned_second = tl.where(is_value, second, second * cos + first * sin)
    q_out = queries_ptr + token * (HEADS * DIM) + head * DIM
    which = tl.where(is_key, 0, 1)
    page_out = pages_ptr + page * PAGE_STRIDE + ((which * KV_HEADS + kv_head) * PAGE + offset) * DIM
    inverse_scale = tl.where(is_key, inverse_key_scale, inverse_value_scale)
    is_cached = page + head * 0 >= 0  # a tile: the interpreter makes an integer of a lone truth value
    _store(turned_first, h, in_half, is_query, is_kept, is_value | is_key, q_out, source, page_out, inverse_scale,
           is_cached, KEEP_KEYS, FLOAT8, MAX)  # fmt: skip
    _store(turned_second, HALF + h, in_half, is_query, is_kept, is_value | is_key, q_out, source, page_out,
           inverse_scale, is_cached, KEEP_KEYS, FLOAT8, MAX)  # fmt: skip
    if REST > 0:
        _store(rest, 2 * HALF + r, r < REST, is_query, is_kept, is_value | is_key, q_out, source, page_out,
               inverse_scale, is_cached, KEEP_KEYS, FLOAT8, MAX)  # fmt: skip


_launch_rope_cache = Launcher(_rope_cache_kernel)
