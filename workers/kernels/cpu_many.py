"""The CPU kernels for many rows: weights are made float32 and turned in panels, each multiplied with all rows.

Imported only to build them (see `native`): numba is here.
"""

from __future__ import annotations

from typing import Any

import numba

from workers.kernels.native import BFLOAT16, FLOAT16, FLOAT32, widens_float16
from workers.kernels.panel import PANEL, ROWS, pack, panel_dots, panel_swiglu
from workers.kernels.vector import LANES

_pack_float32, _pack_bfloat16 = pack(FLOAT32), pack(BFLOAT16)
_pack_float16 = pack(FLOAT16 if widens_float16() else BFLOAT16)


@numba.njit(inline="never")
def _pack(kind, weight, stride, n_rows, k, half):  # type: ignore[no-untyped-def]
    if kind == FLOAT32:
        _pack_float32(weight, stride, n_rows, k, half)
    elif kind == BFLOAT16:
        _pack_bfloat16(weight, stride, n_rows, k, half)
    else:
        _pack_float16(weight, stride, n_rows, k, half)


def _times_rows(tile: Any) -> Any:
    """A panel times all token rows, in tiles of about equal size: of more than 32 rows none has less than ROWS - 4."""
    most, less_1, less_2, less_3, less_4 = (tile(ROWS - less) for less in range(5))

    @numba.njit(inline="never")
    def times_rows(panel, token_rows, n_rows, k, out, out_stride, n_columns):  # type: ignore[no-untyped-def]
        t = 0
        while t < n_rows:
            tiles = (n_rows - t + ROWS - 1) // ROWS
            rows = (n_rows - t + tiles - 1) // tiles
            tokens, y = token_rows + 8 * t, out + t * out_stride
            if rows == ROWS:
                most(panel, tokens, k, y, out_stride, n_columns)
            elif rows == ROWS - 1:
                less_1(panel, tokens, k, y, out_stride, n_columns)
            elif rows == ROWS - 2:
                less_2(panel, tokens, k, y, out_stride, n_columns)
            elif rows == ROWS - 3:
                less_3(panel, tokens, k, y, out_stride, n_columns)
            else:
                less_4(panel, tokens, k, y, out_stride, n_columns)
            t += rows

    return times_rows


_dots, _swiglu = _times_rows(panel_dots), _times_rows(panel_swiglu)


@numba.njit(inline="never")
def many_dots(kind, weight, stride, first, last, token_rows, n_rows, k, out, out_stride, panel):  # type: ignore[no-untyped-def]
    """`out[t, n - first] = dot(weight row n, token row t)` for the weight rows first:last; more than FEW_ROWS rows."""
    for n in range(first, last, PANEL):
        columns = min(PANEL, last - n)
        at = weight + n * stride
        _pack(kind, at, stride, min(LANES, columns), k, panel)
        if columns > LANES:
            _pack(kind, at + LANES * stride, stride, columns - LANES, k, panel + 4 * LANES)
        _dots(panel, token_rows, n_rows, k, out + 4 * (n - first), out_stride, columns)


@numba.njit(inline="never")
def many_swiglu(kind, gate, up, stride, first, last, token_rows, n_rows, k, out, out_stride, panel):  # type: ignore[no-untyped-def]
    """`out[t, n - first] = silu(gate row n . token row t) * (up row n . token row t)` for the rows first:last."""
    for n in range(first, last, LANES):
        columns = min(LANES, last - n)
        _pack(kind, gate + n * stride, stride, columns, k, panel)
        _pack(kind, up + n * stride, stride, columns, k, panel + 4 * LANES)
        _swiglu(panel, token_rows, n_rows, k, out + 4 * (n - first), out_stride, columns)
