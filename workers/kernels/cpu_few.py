"""The CPU kernels for few rows: they stream the weights once, at the speed of the memory.

Weights are float32, bfloat16 or float16, rows and sums float32. Imported only to build them (see `native`): numba is
here.
"""

from __future__ import annotations

from typing import Any

import numba

from workers.kernels.native import BFLOAT16, FLOAT16, FLOAT32, widens_float16
from workers.kernels.tile import COLUMNS, dot_tile, swiglu_tile


def _dot_rows(kind: int) -> Any:
    """The products of many weight rows of a kind with many token rows."""
    dot_1, dot_2, dot_3, dot_4, dot_5, dot_6 = (dot_tile(kind, 4, columns) for columns in range(1, 7))
    single = dot_tile(kind, 1, 1)

    @numba.njit(inline="never")
    def dot_rows(weight, stride, first, last, token_rows, n_rows, k, out, out_stride):  # type: ignore[no-untyped-def]
        """`out[t, n - first] = dot(weight row n, token row t)` for the weight rows first:last."""
        n = first
        while n + 4 <= last:
            w = weight + n * stride
            o = out + 4 * (n - first)
            t = 0
            while t < n_rows:
                chunks = (n_rows - t + COLUMNS - 1) // COLUMNS
                c = (n_rows - t + chunks - 1) // chunks
                tokens = token_rows + 8 * t
                y = o + t * out_stride
                ahead = 4 * stride
                if c == 1:
                    dot_1(w, stride, tokens, k, y, out_stride, ahead)
                elif c == 2:
                    dot_2(w, stride, tokens, k, y, out_stride, ahead)
                elif c == 3:
                    dot_3(w, stride, tokens, k, y, out_stride, ahead)
                elif c == 4:
                    dot_4(w, stride, tokens, k, y, out_stride, ahead)
                elif c == 5:
                    dot_5(w, stride, tokens, k, y, out_stride, ahead)
                else:
                    dot_6(w, stride, tokens, k, y, out_stride, ahead)
                t += c
            n += 4
        while n < last:
            for t in range(n_rows):
                y = out + 4 * (n - first) + t * out_stride
                single(weight + n * stride, stride, token_rows + 8 * t, k, y, out_stride, 0)
            n += 1

    return dot_rows


def _swiglu_rows(kind: int) -> Any:
    """The hidden rows of weights of a kind."""
    swiglu_1, swiglu_2, swiglu_3, swiglu_4, swiglu_5, swiglu_6 = (swiglu_tile(kind, 2, c) for c in range(1, 7))
    single = swiglu_tile(kind, 1, 1)

    @numba.njit(inline="never")
    def swiglu_rows(gate, up, stride, first, last, token_rows, n_rows, k, out, out_stride):  # type: ignore[no-untyped-def]
        """`out[t, n - first] = silu(gate row n . token row t) * (up row n . token row t)` for the rows first:last."""
        n = first
        while n + 2 <= last:
            g, u = gate + n * stride, up + n * stride
            o = out + 4 * (n - first)
            t = 0
            while t < n_rows:
                chunks = (n_rows - t + COLUMNS - 1) // COLUMNS
                c = (n_rows - t + chunks - 1) // chunks
                tokens = token_rows + 8 * t
                y = o + t * out_stride
                ahead = 2 * stride
                if c == 1:
                    swiglu_1(g, u, stride, tokens, k, y, out_stride, ahead)
                elif c == 2:
                    swiglu_2(g, u, stride, tokens, k, y, out_stride, ahead)
                elif c == 3:
                    swiglu_3(g, u, stride, tokens, k, y, out_stride, ahead)
                elif c == 4:
                    swiglu_4(g, u, stride, tokens, k, y, out_stride, ahead)
                elif c == 5:
                    swiglu_5(g, u, stride, tokens, k, y, out_stride, ahead)
                else:
                    swiglu_6(g, u, stride, tokens, k, y, out_stride, ahead)
                t += c
            n += 2
        if n < last:
            for t in range(n_rows):
                y = out + 4 * (n - first) + t * out_stride
                single(gate + n * stride, up + n * stride, stride, token_rows + 8 * t, k, y, out_stride, 0)

    return swiglu_rows


dot_rows = _dot_rows(FLOAT32)
_dot_bfloat16, _swiglu_float32, _swiglu_bfloat16 = _dot_rows(BFLOAT16), _swiglu_rows(FLOAT32), _swiglu_rows(BFLOAT16)
# Where the processor cannot widen float16 nobody calls for it.
_dot_float16, _swiglu_float16 = _dot_bfloat16, _swiglu_bfloat16
if widens_float16():
    _dot_float16, _swiglu_float16 = _dot_rows(FLOAT16), _swiglu_rows(FLOAT16)


@numba.njit
def few_dots(kind, weight, stride, first, last, token_rows, n_rows, k, out, out_stride):  # type: ignore[no-untyped-def]
    """`out[t, n - first] = dot(weight row n of a kind, token row t)` for the weight rows first:last."""
    if kind == FLOAT32:
        dot_rows(weight, stride, first, last, token_rows, n_rows, k, out, out_stride)
    elif kind == BFLOAT16:
        _dot_bfloat16(weight, stride, first, last, token_rows, n_rows, k, out, out_stride)
    else:
        _dot_float16(weight, stride, first, last, token_rows, n_rows, k, out, out_stride)


@numba.njit
def few_swiglu(kind, gate, up, stride, first, last, token_rows, n_rows, k, out, out_stride):  # type: ignore[no-untyped-def]
    """`out[t, n - first] = silu(gate row n . token row t) * (up row n . token row t)`; weights of a kind."""
    if kind == FLOAT32:
        _swiglu_float32(gate, up, stride, first, last, token_rows, n_rows, k, out, out_stride)
    elif kind == BFLOAT16:
        _swiglu_bfloat16(gate, up, stride, first, last, token_rows, n_rows, k, out, out_stride)
    else:
        _swiglu_float16(gate, up, stride, first, last, token_rows, n_rows, k, out, out_stride)
