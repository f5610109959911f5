"""Pages in half their bytes: float8 e4m3 (OCP 8-bit floating point, 1.0) with a power of two for each `GROUP` elements.

Neighbours share a head (K or V of some tokens of one page), so an outlier costs precision only near it. Everything is
done on the bits of bfloat16, where a power of two is an addition; e4m3 is a float, so a finer scale would gain nothing.
numpy alone: the data lines' threads must not start torch's parallel operations.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

GROUP = 128
"""Elements that share an exponent. Pages that are no multiple are filled up with zeros."""
MANTISSA_BITS, BIAS = 7, 127
"""Of bfloat16."""
TOP_EXPONENT = 7
"""The largest element of a group lies below 2 ** 8; e4m3 ends at 448."""


def packed_bytes(size: int, dtype: str) -> int:
    """Bytes on the wire for `size` bytes of pages of `dtype`: an exponent a group, then an element a byte."""
    groups = -(-size // (4 if dtype == "float32" else 2) // GROUP)
    return groups * (1 + GROUP)


def pack(data: memoryview, dtype: str) -> memoryview:
    """Pages as they are stored to their form on the wire."""
    groups = -(-len(data) // (4 if dtype == "float32" else 2) // GROUP)
    bits = np.zeros(groups * GROUP, dtype=np.int16)
    stored = _to_bfloat16(np.frombuffer(data, dtype=np.uint8), dtype)
    bits[: len(stored)] = stored
    size = (bits & 0x7FFF).reshape(groups, GROUP)
    exponents = np.maximum((size.max(axis=1) >> MANTISSA_BITS) - (BIAS + TOP_EXPONENT), -128)
    np.subtract(size, (exponents << MANTISSA_BITS)[:, None], out=size)
    np.maximum(size, 0, out=size)
    np.bitwise_or(size.reshape(-1), bits & -0x8000, out=bits)
    packed = np.empty(groups * (1 + GROUP), dtype=np.uint8)
    packed[:groups] = exponents.astype(np.int8).view(np.uint8)
    np.take(_codes(), bits.view(np.uint16), out=packed[groups:], mode="clip")
    return packed.data


def unpack(packed: memoryview, size: int, dtype: str) -> memoryview:
    """The other way, to `size` bytes."""
    array = np.frombuffer(packed, dtype=np.uint8)
    groups = len(array) // (1 + GROUP)
    exponents = array[:groups].view(np.int8).astype(np.int16)
    codes = array[groups:]
    sizes = np.take(_sizes(), codes, mode="clip").reshape(groups, GROUP)
    bits = np.add(sizes, (exponents << MANTISSA_BITS)[:, None])
    np.maximum(bits, 0, out=bits)
    bits[sizes == 0] = 0
    bits = bits.reshape(-1) | (codes.astype(np.int16) & 128) << 8
    return _from_bfloat16(bits, dtype).view(np.uint8)[:size].data


def _to_bfloat16(data: Array, dtype: str) -> Array:
    """The bits, as int16."""
    if dtype == "bfloat16":
        return data.view(np.int16)
    values = data.view(np.float32) if dtype == "float32" else data.view(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16)


def _from_bfloat16(bits: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return bits
    values = (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values if dtype == "float32" else values.astype(np.float16)


@functools.cache
def _values() -> Array:
    """The number of each code from 0 to 126."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))


@functools.cache
def _sizes() -> Array:
    """By code, the bits of its absolute value in bfloat16, which holds every one exactly."""
    sizes = (_values().astype(np.float32).view(np.uint32) >> 16).astype(np.int16)
    return np.concatenate([sizes, sizes[-1:]] * 2)


@functools.cache
def _codes() -> Array:
    """By the bits of a bfloat16, the nearest code; ties go to the even one, what is too large to the largest."""
    bits = np.arange(2**16, dtype=np.uint32)
    size = np.minimum(np.nan_to_num(((bits & 0x7FFF) << 16).view(np.float32), posinf=448.0), 448.0)
    values = _values()
    above = np.clip(np.searchsorted(values, size), 1, 126)
    below = above - 1
    down, up = size - values[below], values[above] - size
    nearest = np.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
    codes: Array = (nearest | (bits >> 8 & 128)).astype(np.uint8)
    return codes
