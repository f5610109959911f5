"""Packed weights: nothing is lost when they are packed, and products are those of the weights that they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.engine.device import can_pack

if not can_pack():
    pytest.skip("packed weights need numba and AVX2", allow_module_level=True)

from headrace.kernels.packed_linear import BLOCK, GROUP, INPUT, pack, project, quantize

SHAPES = [(16, 32), (64, 96), (112, 576), (80, 1536)]


def weights_of_4_bits(rows: int, inputs: int) -> np.ndarray:
    """As Q4_1 stores them: the lowest value of a block and fifteen steps up, both float16."""
    generator = np.random.default_rng(rows * inputs)
    codes = generator.integers(0, 16, (rows, inputs // BLOCK, BLOCK))
    codes[:, :, 5], codes[:, :, 7] = 0, 15
    scales = generator.uniform(1e-3, 0.05, (rows, inputs // BLOCK, 1)).astype(np.float16).astype(np.float32)
    minima = (-8 * scales + 1e-3).astype(np.float16).astype(np.float32)
    return (codes.astype(np.float32) * scales + minima).reshape(rows, inputs)


def weights_of_8_bits(rows: int, inputs: int) -> np.ndarray:
    """As Q8_0 stores them."""
    generator = np.random.default_rng(rows * inputs)
    codes = generator.integers(-127, 128, (rows, inputs // BLOCK, BLOCK))
    codes[:, :, 3] = 127
    scales = generator.uniform(1e-4, 1e-2, (rows, inputs // BLOCK, 1)).astype(np.float16).astype(np.float32)
    return (codes.astype(np.float32) * scales).reshape(rows, inputs)


def rounded(x: np.ndarray, copies: int) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of `project`, and the values that they stand for."""
    rows, size = x.shape
    inputs = np.empty((rows, copies, size // BLOCK, INPUT), np.float32)
    for row in range(rows):
        for copy in range(copies):
            quantize(x[row], 0, size, np.float32(1), inputs[row, copy].reshape(-1), 0)
    codes = np.ascontiguousarray(inputs[:, 0, :, :8]).view(np.int8).astype(np.float64)
    return inputs.reshape(-1), (codes * inputs[:, 0, :, 8:9]).reshape(rows, size)


@pytest.mark.parametrize("make", [weights_of_4_bits, weights_of_8_bits])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 13, 29])
def test_products_are_those_of_the_weights(make: object, shape: tuple[int, int], rows: int) -> None:
    """Against float64; what is left is float32's own rounding."""
    weight = make(*shape)  # type: ignore[operator]
    packed = pack(weight)
    assert packed is not None
    x = np.random.default_rng(rows).normal(size=(rows, shape[1])).astype(np.float32)
    inputs, values = rounded(x, packed.copies)
    out = np.ones((rows, shape[0] + 8), np.float32)
    records, blocks, width = packed.records.reshape(-1), packed.records.shape[1], out.shape[1]
    for is_sum in (0, 1):
        project(records, 0, blocks, shape[0] // GROUP, inputs, rows, out.reshape(-1), 8, width, is_sum)
    expected = 2 * (values @ weight.T.astype(np.float64))
    size = np.abs(values) @ np.abs(weight.T)
    assert (np.abs(out[:, 8:] - expected) / size).max() < 1e-5
    assert (out[:, :8] == 1).all()


@pytest.mark.parametrize("rows", [2, 5, 8, 30])
def test_a_row_gives_the_same_bits_in_any_company(rows: int) -> None:
    """Tiles of 1 to 4 rows add in the same order."""
    packed = pack(weights_of_4_bits(64, 576))
    assert packed is not None
    x = np.random.default_rng(1).normal(size=(rows, 576)).astype(np.float32)

    def product(some: np.ndarray) -> np.ndarray:
        out = np.empty((len(some), 64), np.float32)
        inputs = rounded(some, 1)[0]
        project(packed.records.reshape(-1), 0, 18, 64 // GROUP, inputs, len(some), out.reshape(-1), 0, 64, 0)
        return out

    together = product(x)
    for row in range(rows):
        assert (product(x[row : row + 1])[0] == together[row]).all()


def test_weights_that_are_not_of_so_few_bits_are_not_packed() -> None:
    """Packing is never an approximation."""
    generator = np.random.default_rng(0)
    assert pack(generator.normal(size=(16, 64)).astype(np.float32)) is None
    assert pack(weights_of_4_bits(16, 64)[:, :48]) is None, "not whole blocks"
    assert pack(weights_of_4_bits(8, 64)) is None, "not whole groups"


def test_constant_blocks_and_zeros_are_packed() -> None:
    """Blocks without a step."""
    weight = np.zeros((16, 64), np.float32)
    weight[3, :32] = 0.5
    packed = pack(weight)
    assert packed is not None
    inputs, values = rounded(np.ones((1, 64), np.float32), packed.copies)
    out = np.empty((1, GROUP), np.float32)
    project(packed.records.reshape(-1), 0, 2 * packed.copies, 1, inputs, 1, out.reshape(-1), 0, GROUP, 0)
    assert np.allclose(out, values @ weight.T, atol=1e-4)


def test_inputs_of_zero_are_rounded_to_zero() -> None:
    """No division by their largest."""
    _, values = rounded(np.zeros((1, 32), np.float32), 1)
    assert (values == 0).all()
