"""Products and transposes of small matrices for compiled loops: tiles that stay in registers, as vector instructions.

Operators spend 10 to 20 us on a batched product of 16 x 16 blocks that holds 4 us of work, and as much on every
elementwise pass between two; inside one loop both are gone. Imported when it is used: numba is an extra.

Every buffer comes from `room`: rows are padded, so that the rows of a tile don't fall on the same lines of the cache.
"""

from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

from lineament.ops.compiled import loop

intrinsic: Any = extending.intrinsic  # its annotations count the typing context among the arguments
ROWS, LANES, VECTORS = 4, 8, 2  # a tile: 8 sums in 256-bit registers, as many as two units of latency 4 keep busy
COLUMNS = LANES * VECTORS
WHOLE, UPPER, LOWER, RESULT = 0, 1, 2, 3  # which factor is triangular: none, the left one, or the product is
SET, ADD, SUBTRACT = 0, 1, 2

_int, _index = ir.IntType(64), ir.IntType(32)


def _pointers(context, builder, kind, value):
    """Return a function (row, column, type) -> pointer into a matrix."""
    array = context.make_array(kind)(context, builder, value)
    strides = cgutils.unpack_tuple(builder, array.strides)
    base = builder.bitcast(array.data, ir.IntType(8).as_pointer())

    def at(row, column, of):
        offset = builder.add(builder.mul(row, strides[0]), builder.mul(column, strides[1]))
        return builder.bitcast(builder.gep(base, [offset]), of.as_pointer())

    return at


def _mask(*lanes):
    return ir.Constant(ir.VectorType(_index, len(lanes)), list(lanes))


@intrinsic
def _tile(typing, a, b, c, i, j, start, stop, mode):
    """c[i : i + ROWS, j : j + COLUMNS] (=, +=, -=) a[i : i + ROWS, start:stop] @ b[start:stop, j : j + COLUMNS]."""

    def generate(context, builder, signature, given):
        (i, j, start, stop, mode), flags = given[3:], ("contract",)
        a_at, b_at, c_at = (_pointers(context, builder, *pair) for pair in zip(signature.args[:3], given, strict=False))
        scalar, size = context.get_value_type(c.dtype), c.dtype.bitwidth // 8
        vector = ir.VectorType(scalar, LANES)
        zero, undefined = ir.Constant(vector, [0.0] * LANES), ir.Constant(vector, ir.Undefined)
        tile = [(m, n) for m in range(ROWS) for n in range(VECTORS)]
        sums = {at: cgutils.alloca_once_value(builder, zero) for at in tile}
        row = [builder.add(i, _int(m)) for m in range(ROWS)]
        column = [builder.add(j, _int(n * LANES)) for n in range(VECTORS)]
        with cgutils.for_range_slice(builder, start, stop, _int(1), _int) as (d, _):
            right = [builder.load(b_at(d, at, vector), align=size) for at in column]
            left = [builder.load(a_at(at, d, scalar)) for at in row]
            left = [builder.insert_element(undefined, x, _index(0)) for x in left]
            left = [builder.shuffle_vector(x, undefined, _mask(*[0] * LANES)) for x in left]
            for m, n in tile:
                product = builder.fmul(left[m], right[n], flags=flags)
                builder.store(builder.fadd(builder.load(sums[m, n]), product, flags=flags), sums[m, n])
        places = {(m, n): c_at(row[m], column[n], vector) for m, n in tile}
        with builder.if_else(builder.icmp_signed("==", mode, _int(SET))) as (put, change):
            with put:
                for at in tile:
                    builder.store(builder.load(sums[at]), places[at], align=size)
            with change:
                minus = builder.icmp_signed("==", mode, _int(SUBTRACT))
                for at in tile:
                    x = builder.load(sums[at])
                    x = builder.select(minus, builder.fsub(zero, x), x)
                    builder.store(builder.fadd(builder.load(places[at], align=size), x), places[at], align=size)
        return context.get_dummy_value()

    return types.void(a, b, c, *[types.int64] * 5), generate


@intrinsic
def _turn(typing, a, c, i, j):
    """c[j : j + LANES, i : i + LANES] = a[i : i + LANES, j : j + LANES]^T, by swapping ever smaller blocks."""

    def generate(context, builder, signature, given):
        a_at, c_at = (_pointers(context, builder, *pair) for pair in zip(signature.args[:2], given, strict=False))
        (i, j), size = given[2:], c.dtype.bitwidth // 8
        vector = ir.VectorType(context.get_value_type(c.dtype), LANES)
        x = [builder.load(a_at(builder.add(i, _int(m)), j, vector), align=size) for m in range(LANES)]
        half = LANES // 2
        while half:
            first = _mask(*(n if not n & half else LANES + n - half for n in range(LANES)))
            second = _mask(*(n + half if not n & half else LANES + n for n in range(LANES)))
            for m in range(LANES):
                if not m & half:
                    pair = x[m], x[m + half]
                    x[m], x[m + half] = (builder.shuffle_vector(*pair, mask) for mask in (first, second))
            half //= 2
        for m in range(LANES):
            builder.store(x[m], c_at(builder.add(j, _int(m)), i, vector), align=size)
        return context.get_dummy_value()

    return types.void(a, c, types.int64, types.int64), generate


@intrinsic
def _move(typing, a, i, c, m, j, add):
    """c[m, j : j + LANES] (=, +=) a[i, j : j + LANES], where the last strides are one."""

    def generate(context, builder, signature, given):
        a_at, c_at = (_pointers(context, builder, signature.args[n], given[n]) for n in (0, 2))
        (i, m, j, add), size = (given[1], *given[3:]), c.dtype.bitwidth // 8
        vector = ir.VectorType(context.get_value_type(c.dtype), LANES)
        x, place = builder.load(a_at(i, j, vector), align=size), c_at(m, j, vector)
        with builder.if_else(builder.icmp_signed("==", add, _int(0))) as (put, change):
            with put:
                builder.store(x, place, align=size)
            with change:
                builder.store(builder.fadd(builder.load(place, align=size), x), place, align=size)
        return context.get_dummy_value()

    return types.void(a, types.int64, c, *[types.int64] * 3), generate


@loop
def move(a, i, c, m, columns, add):
    """c[m, :columns] (=, +=) a[i, :columns]: a row of any strides, which the compiler alone would walk one by one."""
    whole = 0
    if a.strides[1] == a.itemsize and c.strides[1] == c.itemsize:
        whole = columns // LANES * LANES
        for j in range(0, whole, LANES):
            _move(a, i, c, m, j, add)
    for j in range(whole, columns):
        c[m, j] = a[i, j] + (c[m, j] if add else 0)


@intrinsic
def _ask_for(typing, a, i, j):
    """Ask the second cache for the line of a[i, j]."""

    def generate(context, builder, signature, given):
        a_at = _pointers(context, builder, signature.args[0], given[0])
        byte = ir.IntType(8)
        row, column = given[1:]
        place = a_at(row, column, byte)
        kind = ir.FunctionType(ir.VoidType(), [place.type, _index, _index, _index])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [place, _index(0), _index(2), _index(1)])
        return context.get_dummy_value()

    return types.void(a, types.int64, types.int64), generate


@loop
def ask_for(a, start, stop):
    """Ask for the rows start..stop of a [T, W], which a walk needs next: no processor guesses rows this far apart."""
    line = max(64 // a.itemsize, 1)
    for i in range(start, min(stop, a.shape[0])):
        for j in range(0, a.shape[1], line):
            _ask_for(a, i, j)


@loop
def product(a, b, c, rows, depth, columns, mode, triangle):
    """c (=, +=, -=) a b, [rows, depth] x [depth, columns]; rows in fours, columns in sixteens.

    triangle: LOWER: a has nothing behind its diagonal, UPPER: nothing before it; RESULT: only tiles that touch the
    lower triangle of c are formed.
    """
    for j in range(0, columns, COLUMNS):
        for i in range(j if triangle == RESULT else 0, rows, ROWS):
            start = i if triangle == UPPER else 0
            _tile(a, b, c, i, j, start, min(depth, i + ROWS) if triangle == LOWER else depth, mode)


@loop
def solve(lower, x, rows, columns, beta, new):
    """Forward substitution: x_i -= sum_{j < i} lower_ij new_j, new_i = beta_i x_i, from above."""
    for i in range(0, rows, ROWS):
        if i:
            for j in range(0, columns, COLUMNS):
                _tile(lower, new, x, i, j, 0, i, SUBTRACT)
        for m in range(i, i + ROWS):
            for n in range(i, m):
                factor = lower[m, n]
                for c in range(columns):
                    x[m, c] -= factor * new[n, c]
            for c in range(columns):
                new[m, c] = beta[m] * x[m, c]


@loop
def solve_back(lower, x, rows, columns, beta, new):
    """The same from below with the transpose: x_i -= sum_{m > i} lower_mi new_m, new_i = beta_i x_i."""
    for i in range(rows - ROWS, -1, -ROWS):
        if i + ROWS < rows:
            for j in range(0, columns, COLUMNS):
                _tile(lower.T, new, x, i, j, i + ROWS, rows, SUBTRACT)
        for m in range(i + ROWS - 1, i - 1, -1):
            for n in range(m + 1, i + ROWS):
                factor = lower[n, m]
                for c in range(columns):
                    x[m, c] -= factor * new[n, c]
            for c in range(columns):
                new[m, c] = beta[m] * x[m, c]


@loop
def transpose(a, c, rows, columns):
    """c = a^T for a [rows, columns], both in eights."""
    for i in range(0, rows, LANES):
        for j in range(0, columns, LANES):
            _turn(a, c, i, j)
