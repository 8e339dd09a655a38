"""Attention over the paged cache: rows that decode and rows of prompts, each row the same bits in either.

Legend: T token rows, H query heads, G key/value heads, d head size, C cache blocks of Z rows, S sequences, B blocks a
sequence, R rows that decode, I items: (row, split).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from workers.device import to_device
from workers.kernels.cuda.compiled import attention as kernels
from workers.kernels.cuda.launch import options, overlaps, power

LOG2E = 1.4426950408889634
SPLIT, STEP = 256, 64  # keys; the same for every batch and every row, or a row's bits would depend on its batch
_PROGRAMS = 2112  # of a decoding step at least: what keeps a card busy; few of them take more than one split


@dataclass(frozen=True, slots=True)
class Who:
    """Whose rows a step has: the same in every layer, so made once a step. All on the device."""

    sequence_T: Tensor  # int64
    position_T: Tensor  # int64; -1: the row is padding
    block_table_SB: Tensor  # int32
    rows_R: Tensor | None  # int32: the rows that decode; None: all, in order
    tiles: Tensor | None  # int32 [tiles, 2]: first row and number of rows of what one program takes of a prompt
    most_items: int  # I: the most splits that the rows that decode can have

    @property
    def n_decode(self) -> int:
        """R."""
        return len(self.position_T) if self.rows_R is None else len(self.rows_R)


def tile_rows(n_heads: int, n_kv_heads: int, head_dim: int) -> int:
    """Rows of a prompt that one program takes."""
    return max(1, (64 if head_dim > 128 else 128) // power(n_heads // n_kv_heads))


def who(
    sequence_T: Tensor, position_T: Tensor, block_table_SB: Tensor, q_start: tuple[int, ...], rows_a_tile: int,
    block_size: int, most_items: int = 0,
) -> Who:  # fmt: skip
    """Of rows of sequences one after the other: those of sequence s are q_start[s]:q_start[s + 1].

    most_items: the most splits that the rows that decode have together; 0: as many as the block table is wide.
    """
    device, n_splits = position_T.device, -(-block_table_SB.shape[1] * block_size // SPLIT)
    if len(q_start) - 1 == q_start[-1]:
        most = q_start[-1] * n_splits
        return Who(sequence_T, position_T, block_table_SB, None, None, min(most, most_items or most))
    single = [begin for begin, end in pairwise(q_start) if end - begin == 1]
    tiles = [
        (first, min(rows_a_tile, end - first))
        for begin, end in pairwise(q_start)
        if end - begin > 1
        for first in range(begin, end, rows_a_tile)
    ]
    rows_R, at = (to_device(torch.tensor(values, dtype=torch.int32), device) for values in (single, tiles))
    return Who(sequence_T, position_T, block_table_SB, rows_R, at, len(single) * n_splits)


@dataclass(frozen=True, slots=True)
class Items:
    """The splits of the rows that decode, and room for what is found of each."""

    base: Tensor  # int32 [R + 1]
    items: Tensor  # int32 [I, 4]
    part: Tensor  # float32 [I, H, d]
    stat: Tensor  # float32 [I, H, 2]


def make_items(who: Who, n_heads: int, head_dim: int, window: int | None) -> Items | None:
    """Of the layers with `window`; None: no row decodes."""
    r, device = who.n_decode, who.position_T.device
    if r == 0:
        return None
    made = Items(
        torch.empty(r + 1, dtype=torch.int32, device=device),
        torch.empty(who.most_items, 4, dtype=torch.int32, device=device),
        torch.empty(who.most_items, n_heads, head_dim, dtype=torch.float32, device=device),
        torch.empty(who.most_items, n_heads, 2, dtype=torch.float32, device=device),
    )
    kernels.items_kernel[(1,)](
        who.rows_R, who.sequence_T, who.position_T, made.base, made.items, r, WINDOW=window or 0, SPLIT=SPLIT,
        R2=power(r), ROWS=who.rows_R is not None, num_warps=4, **options(device),
    )  # fmt: skip
    return made


def attend(
    q_THd: Tensor, k_CZGd: Tensor, v_CZGd: Tensor, who: Who, items: Items | None, scale: float, window: int | None
) -> Tensor:
    """A row sees the keys of its sequence up to its own position, of which the last `window` when there is one; they
    are written already. Rows that are padding are left as they come. Returns a new [T, H, d]."""
    _, h, d = q_THd.shape
    _, z, g, _ = k_CZGd.shape
    out_THd, device = torch.empty_like(q_THd), q_THd.device
    d2, group = max(16, power(d)), power(h // g)
    sizes = {"H": h, "G": g, "d": d, "D2": d2, "Z": z, "WINDOW": window or 0, "SPLIT": SPLIT, "BJ": STEP}
    table_SB, b = who.block_table_SB, who.block_table_SB.shape[1]
    if items is not None:
        rows = {"ROWS": who.rows_R is not None}
        kernels.decode_kernel[(min(who.most_items, max(_PROGRAMS // g, 4 * who.n_decode)), g)](
            q_THd, k_CZGd, v_CZGd, table_SB, who.rows_R, items.base, items.items, out_THd, items.part, items.stat,
            scale * LOG2E, who.n_decode, b, HG2=max(16, group),
            num_warps=4, num_stages=(3 if d2 <= 128 else 2) if overlaps(device) else 2 if d2 <= 128 else 1, **sizes,
            **rows, **options(device),
        )  # fmt: skip
        if who.most_items > who.n_decode:
            heads = min(8, power(h))
            kernels.merge_kernel[(who.n_decode, -(-h // heads))](
                items.part, items.stat, items.base, who.rows_R, out_THd, scale * LOG2E, H=h, d=d, D2=d2, HM=heads,
                num_warps=4, **rows, **options(device),
            )  # fmt: skip
    if who.tiles is not None:
        bm = max(16, tile_rows(h, g, d) * group)
        kernels.prefill_kernel[(g, len(who.tiles))](
            q_THd, k_CZGd, v_CZGd, table_SB, who.sequence_T, who.position_T, who.tiles, out_THd, scale * LOG2E, b,
            HG2=bm // tile_rows(h, g, d), BM=bm, num_warps=8 if bm >= 128 else 4,
            num_stages=1 if d2 > 128 else 3 if overlaps(device) else 2, **sizes,
        )  # fmt: skip
    return out_THd
