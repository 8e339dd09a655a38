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


def _times_rows(kind: int) -> Any:
    by_1, by_2, by_3, by_4, by_5, by_6 = (tile.dots(kind, ROWS, columns) for columns in range(1, COLUMNS + 1))
    single = tile.dots(kind, 1, 1)

    @numba.njit(inline="never")
    def times_rows(weight, stride, first, last, token_rows, n_rows, k, out, out_stride):  # type: ignore[no-untyped-def]
        block = max(COLUMNS, _BLOCK_BYTES // (4 * k) // COLUMNS * COLUMNS)
        for begin in range(0, n_rows, block):
            end = min(n_rows, begin + block)
            n = first
            while n + ROWS <= last:
                w, y = weight + n * stride, out + 4 * (n - first) + begin * out_stride
                t, ahead = begin, ROWS * stride
                while t < end:
                    c, tokens = end - t, token_rows + 8 * t
                    if c > COLUMNS:  # three at least are left for the last
                        c = COLUMNS if c >= COLUMNS + 3 else (c + 1) // 2
                    if c == 1:
                        by_1(w, stride, tokens, k, y, out_stride, ahead)
                    elif c == 2:
                        by_2(w, stride, tokens, k, y, out_stride, ahead)
                    elif c == 3:
                        by_3(w, stride, tokens, k, y, out_stride, ahead)
                    elif c == 4:
                        by_4(w, stride, tokens, k, y, out_stride, ahead)
                    elif c == 5:
                        by_5(w, stride, tokens, k, y, out_stride, ahead)
                    else:
                        by_6(w, stride, tokens, k, y, out_stride, ahead)
                    t += c
                    y += c * out_stride
                n += ROWS
            while n < last:
                for t in range(begin, end):
                    y = out + 4 * (n - first) + t * out_stride
                    single(weight + n * stride, stride, token_rows + 8 * t, k, y, out_stride, 0)
                n += 1

    return times_rows


_in_float32, _in_bfloat16 = _times_rows(FLOAT32), _times_rows(BFLOAT16)
# Where the processor cannot widen float16 nobody calls for it.
_in_float16 = _times_rows(FLOAT16) if widens_float16() else _in_bfloat16


@numba.njit(inline="never")
def dots(kind, weight, stride, first, last, token_rows, n_rows, k, out, out_stride):  # type: ignore[no-untyped-def]
    """`out[t, n - first] = dot(weight row n of a kind, token row t)` for the weight rows first:last."""
    if kind == FLOAT32:
        _in_float32(weight, stride, first, last, token_rows, n_rows, k, out, out_stride)
    elif kind == BFLOAT16:
        _in_bfloat16(weight, stride, first, last, token_rows, n_rows, k, out, out_stride)
    else:
        _in_float16(weight, stride, first, last, token_rows, n_rows, k, out, out_stride)
