"""Vectors of 256 bits, atomics and semaphores for kernels that numba compiles for a processor with AVX2.

numba turns loops into vectors by itself, but not into the products of 8-bit integers that packed weights need. An
intrinsic here is one or two instructions; indices count elements of a one-dimensional array and are not checked.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model
from numba.np import arrayobj

LANES = 8
"""float32 in a vector."""
LINE = 64
"""Bytes of the cache that come together."""
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES, SHORTS, INTS, FLOATS = (ir.VectorType(*of) for of in ((I8, 32), (I16, 16), (I32, 8), (F32, 8)))


class Vectors(types.Type):  # type: ignore[misc]
    """A vector, or `count` values of one kind, kept in registers."""

    def __init__(self, of: ir.Type, count: int = 0) -> None:
        self.ir = of if count == 0 else ir.ArrayType(of, count)
        super().__init__(f"{count}x[{of}]")


@register_model(Vectors)
class _VectorsModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.ir)


float32x8 = Vectors(FLOATS)


def pointer(context, builder, array_type, array, index, to):
    """A pointer to `to` at element `index` of an array."""
    data = arrayobj.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def load(builder, address):
    """Load from an address that may be odd."""
    value = builder.load(address)
    value.align = 1
    return value


def store(builder, value, address):
    """Store to an address that may be odd."""
    builder.store(value, address).align = 1


def half_vector(context, builder, array_type, array, index):
    """Eight float16 of an array as float32."""
    kind = ir.VectorType(ir.HalfType(), LANES)
    return builder.fpext(load(builder, pointer(context, builder, array_type, array, index, kind)), FLOATS)


def splat(builder, value, vector):
    """All lanes the same."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count))


def call(builder, name, result, *arguments):
    """Call an intrinsic of LLVM's."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def fused_multiply_add(builder, a, b, c):
    """The sum a * b + c, rounded once."""
    return call(builder, "llvm.fma.v8f32", FLOATS, a, b, c)


@intrinsic
def zeros(typing):
    """Eight times 0."""
    return float32x8(), lambda context, builder, signature, given: ir.Constant(FLOATS, [0.0] * LANES)


@intrinsic
def load_floats(typing, array, index):
    """Eight float32 of an array from `index` on."""

    def generate(context, builder, signature, given):
        return load(builder, pointer(context, builder, signature.args[0], given[0], given[1], FLOATS))

    return float32x8(array, types.intp), generate


@intrinsic
def store_floats(typing, array, index, value):
    """Eight float32 into an array from `index` on."""

    def generate(context, builder, signature, given):
        store(builder, given[2], pointer(context, builder, signature.args[0], given[0], given[1], FLOATS))
        return context.get_dummy_value()

    return types.void(array, types.intp, float32x8), generate


@intrinsic
def store_halves(typing, array, index, value):
    """Eight float32 as float16."""

    def generate(context, builder, signature, given):
        halves = builder.fptrunc(given[2], ir.VectorType(ir.HalfType(), LANES))
        store(builder, halves, pointer(context, builder, signature.args[0], given[0], given[1], halves.type))
        return context.get_dummy_value()

    return types.void(array, types.intp, float32x8), generate


@intrinsic
def broadcast(typing, value):
    """Eight times one float32."""
    return float32x8(types.float32), lambda context, builder, signature, given: splat(builder, given[0], FLOATS)


@intrinsic
def multiply_add(typing, a, b, c):
    """The sum a * b + c."""
    return float32x8(float32x8, float32x8, float32x8), (
        lambda context, builder, signature, given: fused_multiply_add(builder, *given)
    )


def _of_two(operation):
    """An intrinsic of two vectors."""

    @intrinsic
    def apply(typing, a, b):
        return float32x8(float32x8, float32x8), (
            lambda context, builder, signature, given: operation(builder, given[0], given[1])
        )

    return apply


add = _of_two(lambda builder, a, b: builder.fadd(a, b))
subtract = _of_two(lambda builder, a, b: builder.fsub(a, b))
multiply = _of_two(lambda builder, a, b: builder.fmul(a, b))
divide = _of_two(lambda builder, a, b: builder.fdiv(a, b))
larger = _of_two(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
smaller = _of_two(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))


def _pairs(builder, a, b, combine):
    """Neighbours combined: two of a, two of b, and so on, as `vhaddps` does."""
    even, odd = (
        builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, 8), [at + i for i in (0, 2, 8, 10, 4, 6, 12, 14)]))
        for at in (0, 1)
    )
    return combine(builder, even, odd)


def _halves(builder, a, combine):
    """The lower four lanes combined with the upper four."""
    lower, upper = (
        builder.shuffle_vector(a, a, ir.Constant(ir.VectorType(I32, 4), list(range(at, at + 4)))) for at in (0, 4)
    )
    return combine(builder, lower, upper)


def _across(combine):
    """An intrinsic that combines eight lanes, neighbours first: always in the same order."""

    @intrinsic
    def apply(typing, a):
        def generate(context, builder, signature, given):
            once = _pairs(builder, given[0], given[0], combine)
            whole = _halves(builder, _pairs(builder, once, once, combine), combine)
            return builder.extract_element(whole, I32(0))

        return types.float32(float32x8), generate

    return apply


sum_lanes = _across(lambda builder, a, b: builder.fadd(a, b))
largest_lane = _across(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


def four_sums(builder, a, b, c, d):
    """`sum_lanes` of four vectors, in a vector of four."""

    def plus(builder, a, b):
        return builder.fadd(a, b)

    first, second = _pairs(builder, a, b, plus), _pairs(builder, c, d, plus)
    return _halves(builder, _pairs(builder, first, second, plus), plus)


@intrinsic
def absolute(typing, a):
    """Without their signs."""
    return float32x8(float32x8), (
        lambda context, builder, signature, given: call(builder, "llvm.fabs.v8f32", FLOATS, given[0])
    )


@intrinsic
def rounded(typing, a):
    """The nearest integers, as float32."""
    return float32x8(float32x8), (
        lambda context, builder, signature, given: call(builder, "llvm.rint.v8f32", FLOATS, given[0])
    )


@intrinsic
def times_power_of_two(typing, a, exponents):
    """Times 2 to the whole numbers -126 to 127 in `exponents`."""

    def generate(context, builder, signature, given):
        biased = builder.add(builder.fptosi(given[1], INTS), ir.Constant(INTS, [127] * LANES))
        power = builder.shl(biased, ir.Constant(INTS, [23] * LANES))
        return builder.fmul(given[0], builder.bitcast(power, FLOATS))

    return float32x8(float32x8, float32x8), generate


@njit(nogil=True, forceinline=True)
def exponential(x):
    """Exponentials of eight, to 7 digits."""
    power = multiply(x, broadcast(np.float32(1.4426950408889634)))
    power = smaller(larger(power, broadcast(np.float32(-126))), broadcast(np.float32(126)))
    whole = rounded(power)
    part = multiply(subtract(power, whole), broadcast(np.float32(0.6931471805599453)))
    value = broadcast(np.float32(1 / 720))
    value = multiply_add(value, part, broadcast(np.float32(1 / 120)))
    value = multiply_add(value, part, broadcast(np.float32(1 / 24)))
    value = multiply_add(value, part, broadcast(np.float32(1 / 6)))
    value = multiply_add(value, part, broadcast(np.float32(0.5)))
    value = multiply_add(value, part, broadcast(np.float32(1)))
    value = multiply_add(value, part, broadcast(np.float32(1)))
    return times_power_of_two(value, whole)


@intrinsic
def store_codes(typing, array, index, value):
    """Store whole numbers -128 to 127 as int8."""

    def generate(context, builder, signature, given):
        codes = builder.trunc(builder.fptosi(given[2], INTS), ir.VectorType(I8, LANES))
        store(builder, codes, pointer(context, builder, signature.args[0], given[0], given[1], codes.type))
        return context.get_dummy_value()

    return types.void(array, types.intp, float32x8), generate


@intrinsic
def bits_of_half(typing, value):
    """The bits of the float16 nearest to a float32."""

    def generate(context, builder, signature, given):
        return builder.bitcast(builder.fptrunc(given[0], ir.HalfType()), I16)

    return types.uint16(types.float32), generate


@intrinsic
def prefetch(typing, array, index, count):
    """Ask for the lines of the cache with `count` bytes of an array, a literal; they may lie behind its end."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    places = range(0, count.literal_value, LINE)

    def generate(context, builder, signature, given):
        first = pointer(context, builder, signature.args[0], given[0], given[1], I8)
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        for place in places:
            builder.call(fetch, [builder.gep(first, [I64(place)]), I32(0), I32(3), I32(1)])  # to read, keep, data
        return context.get_dummy_value()

    return types.void(array, types.intp, count), generate


@intrinsic
def load_acquire(typing, array, index):
    """An int64 that another thread stored with all that it wrote before."""

    def generate(context, builder, signature, given):
        address = pointer(context, builder, signature.args[0], given[0], given[1], I64)
        return builder.load_atomic(address, "acquire", 8)

    return types.int64(array, types.intp), generate


@intrinsic
def store_release(typing, array, index, value):
    """Store an int64 for `load_acquire`."""

    def generate(context, builder, signature, given):
        builder.store_atomic(
            given[2], pointer(context, builder, signature.args[0], given[0], given[1], I64), "release", 8
        )
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), generate


@intrinsic
def add_atomic(typing, array, index, value):
    """Add to an int64; returns what it was."""

    def generate(context, builder, signature, given):
        address = pointer(context, builder, signature.args[0], given[0], given[1], I64)
        return builder.atomic_rmw("add", address, given[2], "acq_rel")

    return types.int64(array, types.intp, types.int64), generate


@intrinsic
def compare_and_swap(typing, array, index, old, new):
    """Replace an int64 if it is still `old`; returns whether it was."""

    def generate(context, builder, signature, given):
        address = pointer(context, builder, signature.args[0], given[0], given[1], I64)
        found = builder.cmpxchg(address, given[2], given[3], "acq_rel", "acquire")
        return builder.extract_value(found, 1)

    return types.boolean(array, types.intp, types.int64, types.int64), generate


@intrinsic
def keep_apart(typing):
    """Never copy the function that calls this into others: its registers are its own, its speed the same everywhere.

    Its stack is aligned, so that no vector that it keeps there lies across two lines of the cache.
    """

    def generate(context, builder, signature, given):
        builder.function.attributes.add("noinline")
        builder.function.attributes.alignstack = LINE
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def pause(typing):
    """Tell the processor that this is a loop that waits."""

    def generate(context, builder, signature, given):
        call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate


wait_semaphore = types.ExternalFunction("sem_wait", types.int32(types.uintp))
post_semaphore = types.ExternalFunction("sem_post", types.int32(types.uintp))
yield_processor = types.ExternalFunction("sched_yield", types.int32())
