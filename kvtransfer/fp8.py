"""Pages in half their bytes: float8 e4m3 (OCP 8-bit floating point, 1.0) with a scale for each `GROUP` elements.

A group is as many neighbours as share a head (K or V of some tokens of one page), so an outlier costs precision only
near it. numpy alone: the data lines' threads must not start torch's parallel operations.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

GROUP = 128
"""Elements that share a scale; every page is a multiple."""
LARGEST = 448.0


def packed_bytes(size: int, dtype: str) -> int:
    """Bytes on the wire for `size` bytes of pages of `dtype`: the scales (float32), then an element a byte."""
    elements = size // (4 if dtype == "float32" else 2)
    return elements + -(-elements // GROUP) * 4


def pack(data: memoryview, dtype: str) -> memoryview:
    """Pages as they are stored to their form on the wire."""
    values = _to_float32(np.frombuffer(data, dtype=np.uint8), dtype)
    count = -(-len(values) // GROUP)
    padded = np.zeros(count * GROUP, dtype=np.float32) if len(values) != count * GROUP else values
    padded[: len(values)] = values
    groups = padded.reshape(count, GROUP)
    scales = np.maximum(np.abs(groups).max(axis=1), 1e-12) / LARGEST
    halves = (groups / scales[:, None]).astype(np.float16).view(np.uint16)
    codes = _codes_of_halves()[halves].reshape(-1)[: len(values)]
    packed = np.empty(packed_bytes(len(data), dtype), dtype=np.uint8)
    packed[: count * 4] = scales.astype(np.float32).view(np.uint8)
    packed[count * 4 :] = codes
    return packed.data


def unpack(packed: memoryview, dtype: str) -> memoryview:
    """The other way."""
    array = np.frombuffer(packed, dtype=np.uint8)
    elements = _elements(len(array))
    count = -(-elements // GROUP)
    scales = array[: count * 4].view(np.float32)
    values = _values()[array[count * 4 :]]
    values *= np.repeat(scales, GROUP)[:elements]
    return _from_float32(values, dtype).view(np.uint8).data


def _elements(packed: int) -> int:
    groups = packed // (GROUP + 4)
    rest = packed - groups * (GROUP + 4)
    return groups * GROUP + max(rest - 4, 0)


def _to_float32(data: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(np.float32 if dtype == "float32" else np.float16).astype(np.float32)


def _from_float32(values: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
    return values if dtype == "float32" else values.astype(np.float16)


@functools.cache
def _values() -> Array:
    """The number of each code."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[(code & 127) == 127] = np.nan
    return np.where(code < 128, size, -size).astype(np.float32)


@functools.cache
def _codes_of_halves() -> Array:
    """The nearest code of each float16, by its bits; ties go to the even code, what is too large to the largest."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    positive = _values()[:127]
    size = np.abs(np.nan_to_num(halves, nan=0.0, posinf=LARGEST, neginf=-LARGEST))
    above = np.clip(np.searchsorted(positive, size), 1, 126)
    below = above - 1
    down, up = size - positive[below], positive[above] - size
    nearest = np.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
    return (nearest + np.where(np.signbit(halves), 128, 0)).astype(np.uint8)
