"""The experts of one layer on a GPU: route, gate and up, down. Nothing but launches, so that a step can be captured.

Legend: T token rows, K choices a token, P = T * K pairs, E experts, S slots, D hidden, F ffn, M row blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.kernels.cuda.compiled import experts as kernels
from workers.kernels.cuda.compiled import route as routing
from workers.kernels.cuda.compiled.norm import quantize_kernel
from workers.kernels.cuda.launch import bulk_copies, descriptor, options, power
from workers.kernels.cuda.tiles import ExpertPlan, Tile, Weights, card, expert_plan

E4M3 = torch.float8_e4m3fn
_ONE_PROGRAM = 32768  # pairs times experts that one program sorts
_CHUNK = 64
_BULK_ROWS = 128  # from so many pairs a block on the copy engine fetches them too
_H_SCALE = 128  # columns of h that share a scale, whatever the tile: else a row's bits would depend on it


@dataclass(frozen=True, slots=True)
class Slots:
    """Weights in slots, w13 [S, 2F, D] (gate over up), w2 [S, D, F], and which of them are a layer's.

    Of 8 bits, with one scale per output channel: s13 float32 [S, 2F], s2 [S, D]; `rows8`: rows travel in 8 bits too.
    """

    w13: Tensor
    w2: Tensor
    slot_E: Tensor  # int32: the slot of each expert, -1: not here
    count_E: Tensor  # int64: the pairs each expert computed
    s13: Tensor | None = None
    s2: Tensor | None = None
    rows8: bool = False

    @property
    def weights(self) -> Weights:
        """As the tile table names them."""
        return "16" if self.s13 is None else "8-rows" if self.rows8 else "8"


@dataclass(frozen=True, slots=True)
class Routed:
    """Pairs in expert order, cut into row blocks."""

    order_P: Tensor  # int32: pairs ascending by (expert, pair); what is beyond the held pairs is not written
    place_P: Tensor  # int32: where each pair is in `order_P`, -1: its expert is not here
    blocks_3M: Tensor  # int32: slot (-1: no block), first row, end row


def compute(
    x_TD: Tensor, ids_TK: Tensor, slots: Slots, x_scale_T: Tensor | None = None, plan: ExpertPlan | None = None
) -> tuple[Tensor, Tensor]:
    """The unweighted rows of all pairs in expert order, y [P, D], and where each pair's is, int32 [P] (-1: not here).

    x: of the dtype of the weights, or e4m3 with `x_scale_T` where rows travel in 8 bits. y: bfloat16 or float16, as x;
    with 8 bits bfloat16.
    """
    _, two_f, d = slots.w13.shape
    n_pairs, n_experts, f = ids_TK.numel(), len(slots.slot_E), two_f // 2
    plan = plan or expert_plan(card(x_TD.device), slots.weights, d, f, -(-n_pairs // n_experts))
    bits8 = slots.s13 is not None
    y_dtype = x_TD.dtype if x_scale_T is None else torch.bfloat16
    y_PD = torch.empty(n_pairs, d, dtype=y_dtype, device=x_TD.device)
    routed = route(ids_TK, slots.slot_E, slots.count_E, plan.bm, plan.blocks(n_pairs, n_experts))
    h_dtype = E4M3 if slots.rows8 else torch.float16 if bits8 else x_TD.dtype
    h_PF = torch.empty(n_pairs, f, dtype=h_dtype, device=x_TD.device)
    if slots.rows8:
        assert plan.up.bn == _H_SCALE and _H_SCALE % plan.down.bk == 0, "tiles of rows in 8 bits"
    h_scale = torch.empty(n_pairs, -(-f // _H_SCALE), dtype=torch.float32, device=x_TD.device) if slots.rows8 else None
    m = routed.blocks_3M.shape[1]
    together = plan.bm >= _BULK_ROWS and bulk_copies(slots.w13) and bulk_copies(slots.w2)
    x: Any = x_TD
    if together:
        x_PD = torch.empty(n_pairs, d, dtype=x_TD.dtype, device=x_TD.device)
        routing.gather_kernel[(n_pairs, -(-d // 4096))](x_TD, routed.place_P, x_PD, D=d, K=ids_TK.shape[1], BD=4096)
        x = descriptor(x_PD, plan.bm, plan.up.bk)
    up, how = _operand(slots.w13, plan.up)
    kernels.gate_up_kernel[(m * -(-f // plan.up.bn),)](
        x, x_scale_T, up, slots.s13, h_PF, h_scale, routed.order_P, routed.blocks_3M, m, D=d, F=f,
        K=ids_TK.shape[1], BM=plan.bm, X_TMA=together, W8=bits8, A8=slots.rows8, **how,
    )  # fmt: skip
    down, how = _operand(slots.w2, plan.down)
    kernels.down_kernel[(m * -(-d // plan.down.bn),)](
        descriptor(h_PF, plan.bm, plan.down.bk) if together else h_PF, h_scale, down, slots.s2, y_PD,
        routed.blocks_3M, m, D=d, F=f, HN=_H_SCALE, BM=plan.bm, X_TMA=together, W8=bits8,
        A8=slots.rows8, **how,
    )  # fmt: skip
    return y_PD, routed.place_P


def route(ids_TK: Tensor, slot_E: Tensor, count_E: Tensor, bm: int, n_blocks: int) -> Routed:
    """Sort the pairs by expert and cut them into at most `n_blocks` blocks of `bm`; ids int32 or int64."""
    n_pairs, n_experts, device = ids_TK.numel(), len(slot_E), ids_TK.device
    order_P, place_P = torch.empty(2, n_pairs, dtype=torch.int32, device=device)
    blocks_3M = torch.empty(3, n_blocks, dtype=torch.int32, device=device)
    e2, p2, m2 = power(n_experts), power(n_pairs), power(n_blocks)
    if max(p2, m2) * e2 <= _ONE_PROGRAM:
        routing.route_kernel[(1,)](
            ids_TK, slot_E, order_P, place_P, blocks_3M, count_E, n_pairs, n_blocks, E=n_experts, E2=e2, P2=p2, M2=m2,
            BM=bm, num_warps=1 if p2 * e2 <= 512 else 4 if p2 * e2 <= 2048 else 8, **options(device),
        )  # fmt: skip
        return Routed(order_P, place_P, blocks_3M)
    n_chunks = -(-n_pairs // _CHUNK)
    chunks = torch.empty(n_chunks + 1, e2, dtype=torch.int32, device=device)
    sizes = {"E": n_experts, "E2": e2, "num_warps": 4}
    routing.count_kernel[(n_chunks,)](ids_TK, slot_E, chunks, n_pairs, CHUNK=_CHUNK, **sizes)
    routing.scan_kernel[(1,)](
        chunks, slot_E, blocks_3M, count_E, n_chunks, n_blocks, C2=max(8192 // e2, 1), M2=max(8192 // e2, 1), BM=bm,
        **sizes,
    )  # fmt: skip
    routing.place_kernel[(n_chunks,)](
        ids_TK, slot_E, chunks, order_P, place_P, n_pairs, n_chunks, CHUNK=_CHUNK, **sizes
    )
    return Routed(order_P, place_P, blocks_3M)


def quantized_rows(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3 [T, D] with a float32 scale each, [T]."""
    (t, d), device = x_TD.shape, x_TD.device
    x8_TD = torch.empty(t, d, dtype=E4M3, device=device)
    scale_T = torch.empty(t, dtype=torch.float32, device=device)
    quantize_kernel[(t,)](x_TD.contiguous(), x8_TD, scale_T, D=d, D2=power(d), num_warps=8, **options(device))
    return x8_TD, scale_T


def _operand(weights_SND: Tensor, tile: Tile) -> tuple[Any, dict[str, Any]]:
    """The weights as a kernel takes them, and the tile as its options."""
    rows_ND = weights_SND.view(-1, weights_SND.shape[-1])
    tma = tile.tma and bulk_copies(rows_ND)
    how = {"BN": tile.bn, "BK": tile.bk, "GROUP": tile.group, "SWAP": tile.swap, "TMA": tma, "num_warps": tile.warps,
           "num_stages": tile.stages} | options(weights_SND.device)  # fmt: skip
    return (descriptor(rows_ND, tile.bn, tile.bk) if tma else rows_ND), how
