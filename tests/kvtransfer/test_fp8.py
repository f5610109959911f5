"""Pages in half their bytes: what is lost, and what never is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.kvtransfer import fp8

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def there_and_back(values: torch.Tensor) -> torch.Tensor:
    """Packed and unpacked."""
    data = memoryview(values.view(torch.uint8).numpy())
    dtype = str(values.dtype).removeprefix("torch.")
    packed = fp8.pack(data, dtype)
    assert len(packed) == fp8.packed_bytes(len(data), dtype)
    result = fp8.unpack(packed, len(data), dtype)
    return torch.from_numpy(np.frombuffer(result, np.uint8).copy()).view(values.dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("length", [1, 127, 128, 1000, 4096])
def test_each_element_keeps_four_significant_bits(dtype: torch.dtype, length: int) -> None:
    """Within a sixteenth of itself, where it is not much smaller than its neighbours."""
    values = torch.randn(length, generator=torch.Generator().manual_seed(length)).to(dtype)
    error = (there_and_back(values).float() - values.float()).abs()
    largest = values.float().abs().max()
    assert bool((error <= values.float().abs() / 15 + largest * 2**-14).all())


@pytest.mark.parametrize("scale", [1e-37, 1e-3, 1.0, 1e37])
def test_the_scale_does_not_matter(scale: float) -> None:
    """A power of two for each group takes it away."""
    values = (torch.randn(1024, generator=torch.Generator().manual_seed(1)) * scale).to(torch.bfloat16)
    error = (there_and_back(values).double() - values.double()).norm() / values.double().norm()
    assert error < 0.04


def test_an_outlier_costs_only_its_group() -> None:
    """Elements of other groups are as precise as without it."""
    values = torch.randn(256, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    spoiled = values.clone()
    spoiled[0] = 1e6
    assert torch.equal(there_and_back(spoiled)[128:], there_and_back(values)[128:])


def test_zeros_stay_zeros_and_signs_stay_signs() -> None:
    """Also beside large neighbours."""
    values = torch.tensor([0.0, -0.0, 1000.0, -1000.0, 3.0, -3.0]).to(torch.bfloat16)
    result = there_and_back(values)
    assert bool((result[:2] == 0).all())
    assert torch.equal(result.sign(), values.sign())


def test_the_codes_are_those_of_torch() -> None:
    """Every bfloat16 of a group whose largest element is just below 2 ** 8."""
    bits = torch.arange(0, (fp8.BIAS + 8) << fp8.MANTISSA_BITS, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    expected = values.float().to(torch.float8_e4m3fn).float()
    for start in range(0, len(values), fp8.GROUP - 1):
        group = torch.cat([torch.tensor([255.0]).to(torch.bfloat16), values[start : start + fp8.GROUP - 1]])
        assert torch.equal(there_and_back(group)[1:].float(), expected[start : start + fp8.GROUP - 1])


@given(st.binary(min_size=2, max_size=600).filter(lambda data: len(data) % 2 == 0))
def test_any_bits_can_be_packed(data: bytes) -> None:
    """Infinities and NaN too: a cache's unused places hold what they hold."""
    packed = fp8.pack(memoryview(data), "bfloat16")
    assert len(fp8.unpack(packed, len(data), "bfloat16")) == len(data)
