"""Norms, gates, rotation and cache write: Triton against torch, in any dtype and on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headrace.kernels import gated_activation, rms_norm, rope_cache
from headrace.kernels.gated_activation import Activation
from headrace.kernels.rope import RopeTables

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class RopeCase:
    """The shape of one call."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    page_size: int
    tokens: int
    normed: bool = False


ROPE_CASES = [
    RopeCase(6, 2, 64, 64, 16, 7),
    RopeCase(3, 3, 80, 32, 32, 1),
    RopeCase(16, 1, 96, 96, 64, 5, normed=True),
    RopeCase(4, 2, 128, 128, 16, 33),
    RopeCase(2, 1, 256, 64, 16, 9, normed=True),
    RopeCase(2, 1, 64, 64, 16, 0),
]


def compare_norms(shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, device: str) -> None:
    """Both norms; the sum must be the same to the bit."""
    x, residual = torch.randn(2, *shape, device=device, dtype=dtype).unbind()
    weight = torch.randn(shape[-1], device=device, dtype=weight_dtype)
    tolerance = TOLERANCE[dtype]
    got = rms_norm._launch(x, None, weight, 1e-5)
    torch.testing.assert_close(got, rms_norm._reference(x, weight, 1e-5), atol=tolerance, rtol=tolerance)
    total = residual + x
    got = rms_norm._launch(x, residual, weight, 1e-5)
    torch.testing.assert_close(residual, total, atol=0, rtol=0)
    torch.testing.assert_close(got, rms_norm._reference(total, weight, 1e-5), atol=tolerance, rtol=tolerance)


def compare_factors(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """What normalises each row."""
    x = torch.randn(shape, device=device, dtype=dtype)
    factors = rms_norm._launch_factors(x, 1e-5)
    torch.testing.assert_close(factors, x.float().square().mean(-1).add(1e-5).rsqrt(), atol=1e-5, rtol=1e-5)


def compare_gate(shape: tuple[int, int], activation: Activation, dtype: torch.dtype, device: str) -> None:
    """Float64 is the reference; large values saturate. With and without factors of the rows."""
    gate_up = torch.randn(shape, device=device, dtype=dtype) * 10
    tolerance = TOLERANCE[dtype]
    for factors in (None, torch.rand(shape[0], device=device)):
        got = gated_activation._launch(gate_up, activation, factors)
        scaled = gate_up.double() if factors is None else gate_up.double() * factors.unsqueeze(1)
        expected = gated_activation._reference(scaled, activation, None)
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def compare_rope_cache(
    case: RopeCase,
    dtype: torch.dtype,
    device: str,
    cache_dtype: torch.dtype | None = None,
    keep_keys: bool = True,
    whole_numbers: bool = False,
    has_factors: bool = False,
) -> None:
    """Queries, kept keys and every slot of the cache; one token has no slot.

    `whole_numbers` at position 0 need no rounding to float8, which the interpreter gets wrong. `has_factors`: rows are
    multiplied, and values are kept, too.
    """
    torch.manual_seed(case.tokens)
    width = (case.heads + 2 * case.kv_heads) * case.head_dim
    inputs = [torch.randn(case.tokens, width, device=device, dtype=dtype) for _ in range(2)]
    positions = torch.randint(0, 500, (case.tokens,), device=device)
    if whole_numbers:
        inputs[0].mul_(3).round_()
        positions.zero_()
    inputs[1].copy_(inputs[0])
    pages = torch.randn(case.tokens + 1, 2, case.kv_heads, case.page_size, case.head_dim, device=device, dtype=dtype)
    caches = [pages.to(cache_dtype or dtype), pages.to(cache_dtype or dtype)]
    slots = torch.randperm((case.tokens + 1) * case.page_size, device=device)[: case.tokens]
    slot_pages, slot_offsets = slots // case.page_size, slots % case.page_size
    slot_pages[2:3] = -1
    angles = torch.arange(500, device=device).unsqueeze(1) * torch.rand(case.rotary_dim // 2, device=device)
    rope = RopeTables(angles.cos(), angles.sin())
    norms = tuple(torch.rand(2, case.head_dim, device=device, dtype=dtype).unbind()) if case.normed else None
    scales = (0.5, 2**-7) if cache_dtype is not None else (1.0, 1.0)
    factors = torch.rand(case.tokens, device=device) + 0.5 if has_factors else None
    got, expected = (
        run(qkv, positions, rope, norms, 1e-6, cache, slot_pages, slot_offsets, keep_keys, scales, factors)
        for run, qkv, cache in zip((rope_cache._launch, rope_cache.rope_cache_reference), inputs, caches, strict=True)
    )
    tolerance = TOLERANCE[dtype]
    for one, other in ((got, expected), inputs):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
    if cache_dtype is None:
        torch.testing.assert_close(*caches, atol=tolerance, rtol=tolerance)
    else:  # one step of three mantissa bits where the two round differently
        torch.testing.assert_close(caches[0].float(), caches[1].float(), atol=2e-3, rtol=0.13)
