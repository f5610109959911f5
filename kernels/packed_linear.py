"""x @ weight.T for weights of 4 bits, each block of 32 inputs with its own scale and minimum (GGUF's Q4_1), on a CPU.

Inputs are rounded to 8 bits, each block with its own scale, as llama.cpp does (Q8_1), so that a product is one of
integers. Eight outputs (a *group*) share a vector, so that nothing is summed across lanes. A *record* holds what a
group has for a block of inputs: scales, minima (8 float16 each), and 128 bytes of codes; byte 4 * row + i of the jth 32
bytes has input 4 * j + i in its low half, 16 + 4 * j + i in its high half.

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
    F32,
    FLOATS,
    I32,
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
    larger,
    largest_lane,
    load,
    load_floats,
    multiply,
    pointer,
    rounded,
    splat,
    store,
    store_codes,
    sum_lanes,
)

BLOCK = 32
"""Inputs that share a scale."""
RECORD = 160
STEPS = 4
"""32 bytes of codes at a time."""
MAX_TILE = 8
CACHED_BYTES = 12288
"""Records that stay in the first cache while they meet many rows."""
TOLERANCE = 2e-3
"""A weight counts as one of 4 bits where it is so near to its code's value, in steps."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in] as records, uint8 [out / 8, blocks, 160]; `copies` is 2 for 8 bits, else 1."""

    records: np.ndarray
    copies: int


def pack(weight: np.ndarray) -> PackedWeight | None:
    """Pack float32 [out, in] without loss; None where a block is neither of 4 nor of 8 bits, or sizes do not fit."""
    rows, inputs = weight.shape
    if rows % LANES or inputs % BLOCK:
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
    groups, blocks = rows // LANES, len(scales) // rows
    halves = codes.reshape(groups, LANES, blocks, 2, STEPS, 4)
    packed = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).transpose(0, 2, 3, 1, 4).reshape(groups, blocks, -1)
    ends = [part.reshape(groups, LANES, blocks).transpose(0, 2, 1) for part in (scales, minima)]
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
def quantize(values, at, size, factor, codes, code, scales, sums, block):
    """Round `size` float32 from `at` on, times `factor`, to int8, each block to a scale of its own.

    Writes codes from `code` on and, from `block` on, scales and the blocks' sums.
    """
    for first in range(0, size, BLOCK):
        place = at + first
        a, b = load_floats(values, place), load_floats(values, place + LANES)
        c, d = load_floats(values, place + 2 * LANES), load_floats(values, place + 3 * LANES)
        largest = largest_lane(larger(larger(absolute(a), absolute(b)), larger(absolute(c), absolute(d))))
        inverse = broadcast(np.float32(127) / largest if largest > np.float32(0) else np.float32(0))
        a, b = rounded(multiply(a, inverse)), rounded(multiply(b, inverse))
        c, d = rounded(multiply(c, inverse)), rounded(multiply(d, inverse))
        store_codes(codes, code + first, a)
        store_codes(codes, code + first + LANES, b)
        store_codes(codes, code + first + 2 * LANES, c)
        store_codes(codes, code + first + 3 * LANES, d)
        step = largest * factor / np.float32(127)
        scales[block] = step
        sums[block] = step * sum_lanes(add(add(a, b), add(c, d)))
        block += 1


def _tile(rows):
    """A kernel for `rows` rows of inputs: each code that is loaded is used for all of them."""
    shorts, floats = Vectors(SHORTS, rows), Vectors(FLOATS, rows)
    if rows == 1:
        parts, join = (lambda builder, value: [value]), (lambda builder, kind, values: values[0])
    else:

        def parts(builder, value):
            return [builder.extract_value(value, row) for row in range(rows)]

        def join(builder, kind, values):
            whole = ir.Constant(kind.ir, ir.Undefined)
            for row, value in enumerate(values):
                whole = builder.insert_value(whole, value, row)
            return whole

    @intrinsic
    def no_sums(typing):
        """Sums of products in 16 bits: 8 times 2 * 15 * 127 fit."""
        return shorts(), lambda context, builder, signature, given: join(
            builder, shorts, [ir.Constant(SHORTS, [0] * 16)] * rows
        )

    @intrinsic
    def no_totals(typing):
        """Outputs so far."""
        return floats(), lambda context, builder, signature, given: join(
            builder, floats, [ir.Constant(FLOATS, [0.0] * LANES)] * rows
        )

    @intrinsic
    def add_products(typing, sums, records, at, codes, first, stride):
        """Of 32 bytes of codes, and 4 inputs of a row for each half."""

        def generate(context, builder, signature, given):
            sums, records, at, codes, first, stride = given
            packed = load(builder, pointer(context, builder, signature.args[1], records, at, BYTES))
            low = builder.and_(packed, ir.Constant(BYTES, [15] * 32))
            high = builder.lshr(packed, ir.Constant(BYTES, [4] * 32))
            new = []
            for row, total in enumerate(parts(builder, sums)):
                start = builder.add(first, builder.mul(stride, stride.type(row)))
                for half, offset in ((low, 0), (high, 16)):
                    where = builder.add(start, start.type(offset))
                    four = load(builder, pointer(context, builder, signature.args[3], codes, where, I32))
                    inputs = builder.bitcast(splat(builder, four, INTS), BYTES)
                    product = call(builder, "llvm.x86.avx2.pmadd.ub.sw", SHORTS, half, inputs)
                    total = builder.add(total, product)
                new.append(total)
            return join(builder, shorts, new)

        return shorts(shorts, records, types.intp, codes, types.intp, types.intp), generate

    @intrinsic
    def add_block(typing, totals, sums, records, at, scales, input_sums, first, stride):
        """Scale a block's sums, and add its minima times the sums of its inputs."""

        def generate(context, builder, signature, given):
            totals, sums, records, at, scales, input_sums, first, stride = given
            halves = ir.VectorType(ir.HalfType(), LANES)

            def ends(offset):
                where = builder.add(at, at.type(offset))
                address = pointer(context, builder, signature.args[2], records, where, halves)
                return builder.fpext(load(builder, address), FLOATS)

            def input_of(array, kind, row):
                where = builder.add(first, builder.mul(stride, stride.type(row)))
                return splat(builder, load(builder, pointer(context, builder, kind, array, where, F32)), FLOATS)

            scale, minimum = ends(0), ends(16)
            ones = ir.Constant(SHORTS, [1] * 16)
            new = []
            for row, (total, sum_) in enumerate(zip(parts(builder, totals), parts(builder, sums), strict=True)):
                exact = builder.sitofp(call(builder, "llvm.x86.avx2.pmadd.wd", INTS, sum_, ones), FLOATS)
                factor = builder.fmul(scale, input_of(scales, signature.args[4], row))
                total = fused_multiply_add(builder, factor, exact, total)
                offset = input_of(input_sums, signature.args[5], row)
                new.append(fused_multiply_add(builder, minimum, offset, total))
            return join(builder, floats, new)

        signature = floats(floats, shorts, records, types.intp, scales, input_sums, types.intp, types.intp)
        return signature, generate

    @intrinsic
    def write(typing, totals, out, first, stride, is_sum):
        """Store the outputs, or add them to what is there."""

        def generate(context, builder, signature, given):
            totals, out, first, stride, is_sum = given
            adds = builder.icmp_signed("!=", is_sum, is_sum.type(0))
            for row, total in enumerate(parts(builder, totals)):
                where = builder.add(first, builder.mul(stride, stride.type(row)))
                address = pointer(context, builder, signature.args[1], out, where, FLOATS)
                added = builder.fadd(total, load(builder, address))
                store(builder, builder.select(adds, added, total), address)
            return context.get_dummy_value()

        return types.void(floats, out, types.intp, types.intp, types.int64), generate

    @njit(nogil=True)
    def tile(records, base, blocks, groups, inputs, row, out, column, width, is_sum, steps):
        codes, scales, sums = inputs
        for group in range(groups):
            totals = no_totals()
            for block in range(blocks):
                at = base + (group * blocks + block) * RECORD
                products = no_sums()
                first = (row * blocks + block) * BLOCK
                for step in range(steps):
                    products = add_products(
                        products, records, at + 32 + 32 * step, codes, first + 4 * step, blocks * BLOCK
                    )
                totals = add_block(totals, products, records, at, scales, sums, row * blocks + block, blocks)
            write(totals, out, row * width + column + group * LANES, width, is_sum)

    return tile


_tile_of_1, _tile_of_2, _tile_of_3, _tile_of_4, _tile_of_8 = (_tile(rows) for rows in (1, 2, 3, 4, 8))


@njit(nogil=True)
def project(records, base, blocks, groups, inputs, rows, out, column, width, is_sum):
    """`groups` groups of outputs of all rows, from the records at `base` on.

    inputs: int8 codes [rows, blocks * 32], float32 scales and sums [rows, blocks], see `quantize`; to out [rows, width]
    from `column` on, added to what is there if `is_sum` is not 0. All arrays flat.
    """
    few = max(CACHED_BYTES // (blocks * RECORD), 1) if rows > MAX_TILE else groups
    for first in range(0, groups, few):
        start = base + first * blocks * RECORD
        place = column + first * LANES
        _project_few(records, start, blocks, min(few, groups - first), inputs, rows, out, place, width, is_sum)


@njit(nogil=True)
def _project_few(records, base, blocks, groups, inputs, rows, out, column, width, is_sum):
    # Not a constant to the compiler, which would unroll the loop over it and then run out of registers.
    steps = min(STEPS, blocks * STEPS)
    row = rows // MAX_TILE * MAX_TILE
    for first in range(0, row, MAX_TILE):
        _tile_of_8(records, base, blocks, groups, inputs, first, out, column, width, is_sum, steps)
    if rows - row >= 4:
        _tile_of_4(records, base, blocks, groups, inputs, row, out, column, width, is_sum, steps)
        row += 4
    if rows - row == 3:
        _tile_of_3(records, base, blocks, groups, inputs, row, out, column, width, is_sum, steps)
        row += 3
    if rows - row >= 2:
        _tile_of_2(records, base, blocks, groups, inputs, row, out, column, width, is_sum, steps)
        row += 2
    if rows > row:
        _tile_of_1(records, base, blocks, groups, inputs, row, out, column, width, is_sum, steps)
