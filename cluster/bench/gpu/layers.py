"""One layer's experts beside torch's grouped product, in microseconds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.bench.gpu.timing import graph_us, median_us
from workers.kernels.cuda.experts import Slots, compute

D, FFN, E, K = 4096, 14336, 8, 2
SIZES = (1, 16, 64, 256, 1024, 8192)


def experts_us() -> dict[int, dict[str, float]]:
    """By number of rows: ours and `torch._grouped_mm`, of Mixtral 8x7B's size, over weights that no cache holds."""
    layers = [_layer(seed) for seed in range(3)]
    return {n: _both(layers, n) for n in SIZES}


def _layer(seed: int) -> Slots:
    torch.manual_seed(seed)
    w13 = torch.empty(E, 2 * FFN, D, dtype=torch.bfloat16, device="cuda").normal_(0, D**-0.5)
    w2 = torch.empty(E, D, FFN, dtype=torch.bfloat16, device="cuda").normal_(0, FFN**-0.5)
    counts = torch.zeros(E, dtype=torch.int64, device="cuda")
    return Slots(w13, w2, torch.arange(E, dtype=torch.int32, device="cuda"), counts)


def _both(layers: list[Slots], n: int) -> dict[str, float]:
    x_TD = torch.randn(n, D, device="cuda", dtype=torch.bfloat16)
    ids_TK = torch.rand(n, E, device="cuda").argsort(1)[:, :K].contiguous()

    def ours(i: int) -> object:
        return compute(x_TD, ids_TK, layers[i % len(layers)])

    def grouped(i: int) -> object:
        return _grouped(x_TD, ids_TK, layers[i % len(layers)])

    if n > 1024:
        return {"expertmesh": median_us(lambda: ours(0), 3), "grouped_mm": median_us(lambda: grouped(0), 3)}
    return {"expertmesh": graph_us(ours, 6, 3), "grouped_mm": graph_us(grouped, 6, 3)}


def _grouped(x_TD: Tensor, ids_TK: Tensor, layer: Slots) -> Tensor:
    """Rows sorted by expert, two grouped products, SiLU between."""
    sorted_P, order_P = torch.sort(ids_TK.flatten(), stable=True)
    ends_E = torch.searchsorted(sorted_P, torch.arange(E, device=x_TD.device), right=True, out_int32=True)
    x_PD = x_TD.index_select(0, order_P // K)
    gate_PF, up_PF = torch._grouped_mm(x_PD, layer.w13.transpose(1, 2), offs=ends_E).chunk(2, dim=1)
    return torch._grouped_mm(F.silu(gate_PF) * up_PF, layer.w2.transpose(1, 2), offs=ends_E)
