"""x @ weight.T for weights of 4 bits, each block of 32 inputs with its own scale and minimum (GGUF's Q4_1), on a CPU.

Inputs are rounded to 8 bits, each block with its own scale, as llama.cpp does (Q8_1), so that a product is one of
integers. Eight outputs share a vector, so that nothing is summed across lanes, and two vectors are a *group*, so that
an input that is loaded serves both. A *record* holds what a group has for a block of inputs: scales, minima (16 float16
each), and 256 bytes of codes; byte 4 * output + i of the vth vector of the jth 64 bytes has input 4 * j + i in its low
half, 16 + 4 * j + i in its high half.

A weight of 8 bits (Q8_0) is the sum of two of 4 bits: 16 times its high half, and its low half. Its records for the
high halves come before those for the low ones, and its inputs are there twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from headrace.kernels.simd import (
    BYTES,
    FLOATS,
    I8,
    INTS,
    LANES,
    SHORTS,
    Vectors,
    absolute,
    add,
    bits_of_half,
    broadcast,
    call,
    fused_multiply_add,
    half_vector,
    keep_apart,
    larger,
    largest_lane,
    load,
    load_floats,
    multiply,
    pointer,
    prefetch,
    rounded,
    splat,
    store,
    store_codes,
    sum_lanes,
)

BLOCK = 32
"""Inputs that share a scale."""
VECTORS = 2
GROUP = VECTORS * LANES
RECORD = 320
STEPS = 4
"""32 bytes of codes of each vector at a time."""
INPUT = 10
"""float32 that a block of a row's inputs takes: 32 int8, their scale, and their sum."""
AHEAD = 4 * RECORD
"""Bytes from the record in use to the one that is asked for: the processor by itself looks less far ahead than memory
is away."""
MAX_TILE = 4
CACHED_BYTES = 12288
"""Records that stay in the first cache while they meet many rows."""
TOLERANCE = 2e-3
"""A weight counts as one of 4 bits where it is so near to its code's value, in steps."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in] as records, uint8 [out / 16, blocks, 320]; `copies` is 2 for 8 bits, else 1."""

    records: np.ndarray
    copies: int


def pack(weight: np.ndarray) -> PackedWeight | None:
    """Pack float32 [out, in] without loss; None where a block is neither of 4 nor of 8 bits, or sizes do not fit."""
    rows, inputs = weight.shape
    if rows % GROUP or inputs % BLOCK:
        return None
    flat = np.ascontiguousarray(weight, np.float32).reshape(-1)
    blocks = rows * inputs // BLOCK
    codes = np.empty(rows * inputs, np.uint8)
    scales, minima = np.empty((2, blocks), np.float16)
    bits = (scales.view(np.uint16), minima.view(np.uint16))
    if _codes_of_4_bits(flat, codes, *bits):
        return PackedWeight(_records(codes, scales, minima, rows), 1)
    if not _codes_of_8_bits(flat, codes, bits[0]):
        return None
    high = _records(codes >> 4, scales * np.float16(16), scales * np.float16(-128), rows)
    low = _records(codes & 15, scales, np.zeros_like(scales), rows)
    return PackedWeight(aligned(np.concatenate((high, low), axis=1)), 2)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins at a multiple of 64 bytes: vectors across two lines of the cache cost twice."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    first = -memory.ctypes.data % 64
    copy = memory[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _records(codes: np.ndarray, scales: np.ndarray, minima: np.ndarray, rows: int) -> np.ndarray:
    groups, blocks = rows // GROUP, len(scales) // rows
    halves = codes.reshape(groups, GROUP, blocks, 2, STEPS, 4)
    packed = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).transpose(0, 2, 3, 1, 4).reshape(groups, blocks, -1)
    ends = [part.reshape(groups, GROUP, blocks).transpose(0, 2, 1) for part in (scales, minima)]
    return aligned(np.concatenate([np.ascontiguousarray(end).view(np.uint8) for end in ends] + [packed], axis=2))


@njit(cache=True)
def _codes_of_4_bits(values, codes, scales, minima):
    """Whether all blocks lie on 16 evenly spaced values; fills in the codes, and the bits of scales and minima."""
    for block in range(len(scales)):
        part = values[block * BLOCK : (block + 1) * BLOCK]
        lowest, spread = part.min(), part.max() - part.min()
        minima[block] = bits_of_half(lowest)
        scales[block] = 0
        codes[block * BLOCK : (block + 1) * BLOCK] = 0
        found = spread == 0.0
        for steps in range(15, 0, -1):
            if found:
                break
            step = spread / np.float32(steps)
            found = True
            for i in range(BLOCK):
                code = np.rint((part[i] - lowest) / step)
                found &= abs(lowest + step * code - part[i]) <= TOLERANCE * step
                codes[block * BLOCK + i] = np.uint8(code)
            scales[block] = bits_of_half(step)
        if not found:
            return False
    return True


@njit(cache=True)
def _codes_of_8_bits(values, codes, scales):
    """The same for -127 to 127 times a scale; codes are 128 more."""
    for block in range(len(scales)):
        part = values[block * BLOCK : (block + 1) * BLOCK]
        step = np.float32(np.abs(part).max() / np.float32(127))
        scales[block] = bits_of_half(step)
        for i in range(BLOCK):
            code = np.rint(part[i] / step) if step > 0.0 else np.float32(0)
            if abs(step * code - part[i]) > 16 * TOLERANCE * step:
                return False
            codes[block * BLOCK + i] = np.uint8(code + 128)
    return True


@njit(nogil=True, forceinline=True)
def quantize(values, at, size, factor, inputs, place):
    """Round `size` float32 from `at` on, times `factor`, to int8, each block to a scale of its own.

    Writes the blocks to `inputs`, float32 [rows, blocks, 10] in one row, from `place` on.
    """
    for first in range(at, at + size, BLOCK):
        a, b = load_floats(values, first), load_floats(values, first + LANES)
        c, d = load_floats(values, first + 2 * LANES), load_floats(values, first + 3 * LANES)
        largest = largest_lane(larger(larger(absolute(a), absolute(b)), larger(absolute(c), absolute(d))))
        inverse = broadcast(np.float32(127) / largest if largest > np.float32(0) else np.float32(0))
        a, b = rounded(multiply(a, inverse)), rounded(multiply(b, inverse))
        c, d = rounded(multiply(c, inverse)), rounded(multiply(d, inverse))
        store_codes(inputs, place, a)
        store_codes(inputs, place + 2, b)
        store_codes(inputs, place + 4, c)
        store_codes(inputs, place + 6, d)
        step = largest * factor / np.float32(127)
        inputs[place + 8] = step
        inputs[place + 9] = step * sum_lanes(add(add(a, b), add(c, d)))
        place += INPUT


def _tile(rows):
    """A kernel for `rows` rows of inputs: what is loaded of a group's weights is used for all of them."""
    sums, totals = Vectors(SHORTS, rows * VECTORS), Vectors(FLOATS, rows * VECTORS)
    addresses = Vectors(I8.as_pointer(), rows)

    def parts(builder, value):
        return [builder.extract_value(value, index) for index in range(value.type.count)]

    def join(builder, kind, values):
        whole = ir.Constant(kind.ir, ir.Undefined)
        for index, value in enumerate(values):
            whole = builder.insert_value(whole, value, index)
        return whole

    def spread(builder, address, offset, count, to):
        """All lanes the number that is `offset` and `count` more bytes behind an address."""
        place = builder.gep(builder.gep(address, [offset]), [offset.type(count)])
        kind = to.element
        return splat(builder, load(builder, builder.bitcast(place, kind.as_pointer())), to)

    @intrinsic
    def row_addresses(typing, inputs, first, stride):
        """Of the rows' inputs."""

        def generate(context, builder, signature, given):
            inputs, first, stride = given
            places = [builder.add(first, builder.mul(stride, stride.type(row))) for row in range(rows)]
            found = [pointer(context, builder, signature.args[0], inputs, place, I8) for place in places]
            return join(builder, addresses, found)

        return addresses(inputs, types.intp, types.intp), generate

    @intrinsic
    def no_sums(typing):
        """Sums of products in 16 bits: 8 times 2 * 15 * 127 fit."""
        zero = ir.Constant(SHORTS, [0] * SHORTS.count)
        return sums(), lambda context, builder, signature, given: join(builder, sums, [zero] * sums.ir.count)

    @intrinsic
    def no_totals(typing):
        """Outputs so far."""
        zero = ir.Constant(FLOATS, [0.0] * LANES)
        return totals(), lambda context, builder, signature, given: join(builder, totals, [zero] * totals.ir.count)

    @intrinsic
    def add_products(typing, so_far, records, at, inputs, offset):
        """Of 32 bytes of each vector's codes, and 4 inputs of a row for each half."""

        def generate(context, builder, signature, given):
            so_far, records, at, inputs, offset = given
            new, four = parts(builder, so_far), ir.Constant(BYTES, [4] * BYTES.count)
            places = [builder.add(at, at.type(vector * BYTES.count)) for vector in range(VECTORS)]
            packed = [load(builder, pointer(context, builder, signature.args[1], records, at, BYTES)) for at in places]
            low = [builder.and_(codes, ir.Constant(BYTES, [15] * BYTES.count)) for codes in packed]
            high = [builder.lshr(codes, four) for codes in packed]
            for halves, begin in ((low, 0), (high, 16)):
                for row, address in enumerate(parts(builder, inputs)):
                    same = builder.bitcast(spread(builder, address, offset, begin, INTS), BYTES)
                    for index, codes in enumerate(halves, row * VECTORS):
                        product = call(builder, "llvm.x86.avx2.pmadd.ub.sw", SHORTS, codes, same)
                        new[index] = builder.add(new[index], product)
            return join(builder, sums, new)

        return sums(sums, records, types.intp, addresses, types.intp), generate

    @intrinsic
    def add_block(typing, so_far, products, records, at, inputs, offset):
        """Scale a block's sums, and add its minima times the sums of its inputs."""

        def generate(context, builder, signature, given):
            so_far, products, records, at, inputs, offset = given

            def ends(vector, minima):
                place = builder.add(at, at.type(2 * (minima * GROUP + vector * LANES)))
                return half_vector(context, builder, signature.args[2], records, place)

            weights = [(ends(vector, 0), ends(vector, 1)) for vector in range(VECTORS)]
            ones = ir.Constant(SHORTS, [1] * SHORTS.count)
            new, exact = parts(builder, so_far), parts(builder, products)
            for row, address in enumerate(parts(builder, inputs)):
                step, sum_ = (spread(builder, address, offset, BLOCK + end, FLOATS) for end in (0, 4))
                for index, (scale, minimum) in enumerate(weights, row * VECTORS):
                    whole = call(builder, "llvm.x86.avx2.pmadd.wd", INTS, exact[index], ones)
                    factor, whole = builder.fmul(scale, step), builder.sitofp(whole, FLOATS)
                    new[index] = fused_multiply_add(builder, factor, whole, new[index])
                    new[index] = fused_multiply_add(builder, minimum, sum_, new[index])
            return join(builder, totals, new)

        return totals(totals, sums, records, types.intp, addresses, types.intp), generate

    @intrinsic
    def write(typing, values, out, first, stride, is_sum):
        """Store the outputs, or add them to what is there."""

        def generate(context, builder, signature, given):
            values, out, first, stride, is_sum = given
            adds = builder.icmp_signed("!=", is_sum, is_sum.type(0))
            for index, value in enumerate(parts(builder, values)):
                place = builder.add(first, builder.mul(stride, stride.type(index // VECTORS)))
                place = builder.add(place, place.type(index % VECTORS * LANES))
                address = pointer(context, builder, signature.args[1], out, place, FLOATS)
                added = builder.fadd(value, load(builder, address))
                store(builder, builder.select(adds, added, value), address)
            return context.get_dummy_value()

        return types.void(totals, out, types.intp, types.intp, types.int64), generate

    @njit(nogil=True)
    def tile(records, base, blocks, groups, inputs, row, out, column, width, is_sum, steps):
        keep_apart()
        addresses = row_addresses(inputs, row * blocks * INPUT, blocks * INPUT)
        for group in range(groups):
            outputs = no_totals()
            for block in range(blocks):
                at, offset = base + (group * blocks + block) * RECORD, 4 * INPUT * block
                prefetch(records, at + AHEAD, RECORD)
                products = no_sums()
                for step in range(steps):
                    codes = at + 4 * GROUP + 4 * GROUP * step
                    products = add_products(products, records, codes, addresses, offset + 4 * step)
                outputs = add_block(outputs, products, records, at, addresses, offset)
            write(outputs, out, row * width + column + group * GROUP, width, is_sum)

    return tile


_tile_of_1, _tile_of_2, _tile_of_3, _tile_of_4 = (_tile(rows) for rows in (1, 2, 3, 4))


@njit(nogil=True)
def project(records, base, blocks, groups, inputs, rows, out, column, width, is_sum):
    """`groups` groups of outputs of all rows, from the records at `base` on.

    inputs: float32 [rows, blocks, 10], see `quantize`; to out [rows, width] from `column` on, added to what is there if
    `is_sum` is not 0. All arrays flat.
    """
    few = max(CACHED_BYTES // (blocks * RECORD), 1) if rows > MAX_TILE else groups
    for first in range(0, groups, few):
        start = base + first * blocks * RECORD
        place = column + first * GROUP
        _project_few(records, start, blocks, min(few, groups - first), inputs, rows, out, place, width, is_sum)


@njit(nogil=True)
def _project_few(records, base, blocks, groups, inputs, rows, out, column, width, is_sum):
    # Not a constant to the compiler, which would unroll the loop over it and then run out of registers.
    steps = min(STEPS, blocks * STEPS)
    row = rows // MAX_TILE * MAX_TILE
    for first in range(0, row, MAX_TILE):
        _tile_of_4(records, base, blocks, groups, inputs, first, out, column, width, is_sum, steps)
    if rows - row == 3:
        _tile_of_3(records, base, blocks, groups, inputs, row, out, column, width, is_sum, steps)
    elif rows - row == 2:
        _tile_of_2(records, base, blocks, groups, inputs, row, out, column, width, is_sum, steps)
    elif rows - row == 1:
        _tile_of_1(records, base, blocks, groups, inputs, row, out, column, width, is_sum, steps)
