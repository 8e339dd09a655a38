"""Products of many weight rows with any number of token rows, tile by tile.

A dot product is one sequence of additions (see `tile`), whatever the tile, so a row's result does not depend on how
many rows are computed with it. Few rows stream the weights once, at the speed of the memory; many rows go in blocks
that stay in a core's cache while all weight rows of a unit pass. Weights are float32, bfloat16 or float16, rows and
sums float32. Imported only to build the kernels (see `library`): numba is here.
"""

from __future__ import annotations

from typing import Any

import numba

from workers.kernels.cpu.compiled import tile
from workers.kernels.cpu.compiled.tile import COLUMNS, ROWS
from workers.kernels.cpu.kernel import BFLOAT16, FLOAT16, FLOAT32, widens_float16

#: Bytes of token rows that are multiplied with all weight rows of a unit before the next ones.
_BLOCK_BYTES = 384 << 10


def _times_rows(product: Any, kind: int, rows: int) -> Any:
    """`product` of `rows` weight rows at a time."""
    by_1, by_2, by_3, by_4, by_5, by_6 = (product(kind, rows, columns) for columns in range(1, COLUMNS + 1))
    single = product(kind, 1, 1)

    @numba.njit(inline="never")
    def times_rows(weight, up, stride, first, last, token_rows, n_rows, k, out, out_stride):  # type: ignore[no-untyped-def]
        block = max(COLUMNS, _BLOCK_BYTES // (4 * k) // COLUMNS * COLUMNS)
        for begin in range(0, n_rows, block):
            end = min(n_rows, begin + block)
            n = first
            while n + rows <= last:
                w, u, y = weight + n * stride, up + n * stride, out + 4 * (n - first) + begin * out_stride
                t, ahead = begin, rows * stride
                while t < end:
                    chunks = (end - t + COLUMNS - 1) // COLUMNS
                    c = (end - t + chunks - 1) // chunks
                    tokens = token_rows + 8 * t
                    if c == 1:
                        by_1(w, u, stride, tokens, k, y, out_stride, ahead)
                    elif c == 2:
                        by_2(w, u, stride, tokens, k, y, out_stride, ahead)
                    elif c == 3:
                        by_3(w, u, stride, tokens, k, y, out_stride, ahead)
                    elif c == 4:
                        by_4(w, u, stride, tokens, k, y, out_stride, ahead)
                    elif c == 5:
                        by_5(w, u, stride, tokens, k, y, out_stride, ahead)
                    else:
                        by_6(w, u, stride, tokens, k, y, out_stride, ahead)
                    t += c
                    y += c * out_stride
                n += rows
            while n < last:
                for t in range(begin, end):
                    y, w, u = out + 4 * (n - first) + t * out_stride, weight + n * stride, up + n * stride
                    single(w, u, stride, token_rows + 8 * t, k, y, out_stride, 0)
                n += 1

    return times_rows


def _by_kind(product: Any, rows: int) -> Any:
    in_float32, in_bfloat16 = _times_rows(product, FLOAT32, rows), _times_rows(product, BFLOAT16, rows)
    # Where the processor cannot widen float16 nobody calls for it.
    in_float16 = _times_rows(product, FLOAT16, rows) if widens_float16() else in_bfloat16

    @numba.njit(inline="never")
    def by_kind(kind, weight, up, stride, first, last, token_rows, n_rows, k, out, out_stride):  # type: ignore[no-untyped-def]
        if kind == FLOAT32:
            in_float32(weight, up, stride, first, last, token_rows, n_rows, k, out, out_stride)
        elif kind == BFLOAT16:
            in_bfloat16(weight, up, stride, first, last, token_rows, n_rows, k, out, out_stride)
        else:
            in_float16(weight, up, stride, first, last, token_rows, n_rows, k, out, out_stride)

    return by_kind


#: `out[t, n - first] = dot(weight row n of a kind, token row t)` for the weight rows first:last.
dots = _by_kind(tile.dots, ROWS)
#: `out[t, n - first] = silu(gate row n . token row t) * (up row n . token row t)` for the weight rows first:last.
swiglu = _by_kind(tile.swiglu, ROWS // 2)
