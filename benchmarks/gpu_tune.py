"""Find the fastest tiles of this card for a model, and write them to the table: `python -m benchmarks.gpu_tune`.

Tiles never change bits, so the table can be written at any time, and is after each kind of weights. Products that do
not fit the card's shared memory, or that its compiler refuses, are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from cluster.bench.common import console
from cluster.bench.gpu.timing import graph_us
from workers.kernels.cuda import tiles
from workers.kernels.cuda.experts import E4M3, Slots, compute, quantized_rows
from workers.kernels.cuda.launch import capability
from workers.kernels.cuda.linear import linear
from workers.kernels.cuda.tiles import ExpertPlan, LinearPlan, Tile, Weights

#: Pairs of an expert up to, rows a block; by the weights.
_PAIRS: dict[Weights, tuple[tuple[int | None, int], ...]] = {
    "16": ((8, 16), (20, 32), (44, 64), (256, 128), (None, 128)),
    "8": ((8, 16), (44, 32), (None, 64)),
    "8-rows": ((8, 16), (20, 32), (44, 64), (None, 128)),
}
_ROWS = ((16, 16), (32, 32), (64, 64), (1024, 128), (None, 128))  # rows up to, rows a block
_MANY = 1024  # pairs or rows that stand for any larger number


def tune(
    hidden: Annotated[int, typer.Option(help="hidden size")] = 4096,
    ffn: Annotated[int, typer.Option(help="FFN size of an expert")] = 14336,
    experts: Annotated[int, typer.Option(help="experts of a layer")] = 8,
    top_k: Annotated[int, typer.Option(help="experts of a token")] = 2,
    outputs: Annotated[int, typer.Option(help="outputs of a projection")] = 6144,
    write: Annotated[bool, typer.Option(help="write the table; else only print")] = True,
) -> None:
    """Tiles of a projection and of experts of 16 bits, and of 8 where the card has such products."""
    device = torch.device("cuda", 0)
    known = tiles.card(device) or torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
    content = json.loads(tiles.TABLE.read_text(encoding="utf-8"))
    if known not in content["cards"]:
        content["cards"].append(known)
    content["alike"].setdefault(known, "")

    def keep(kind: str, shape: str, rows: list[dict[str, Any]]) -> None:
        content[kind].setdefault(known, {"any": rows})[shape] = rows
        if write:
            tiles.TABLE.write_text(written(content), encoding="utf-8")
            console.print(f"written: {tiles.TABLE}, {kind} of {known}")

    keep("linear", f"{outputs}x{hidden}", [linear_row(outputs, hidden, *size) for size in _ROWS])
    for weights, sizes in _PAIRS.items():
        if weights == "16" or capability(device) >= (8, 9):
            rows = [expert_row(weights, hidden, ffn, experts, top_k, *size) for size in sizes]
            keep(f"experts {weights}", f"{hidden}x{ffn}", rows)


def candidates(bm: int) -> Iterator[Tile]:
    """Tiles worth trying for blocks of `bm` rows."""
    tma = capability(torch.device("cuda", 0)) >= (9, 0)
    for bn, bk, warps, stages in product((32, 64, 128, 256), (64, 128, 256), (4, 8), (3, 4, 5)):
        if bn * bk > 32768 or bn * bk * stages > 131072 or (bm >= 128 and warps == 4):
            continue
        for swap in (False, True) if bm < 128 else (False,):
            yield Tile(bn, bk, warps, stages, swap, tma, 16 if bm >= 128 else 0)


def fastest(bm: int, time_us: Callable[[Tile], float], fits: Callable[[Tile], bool] = lambda tile: True) -> Tile:
    """Of the candidates that fit."""
    found: dict[Tile, float] = {}
    for tile in filter(fits, candidates(bm)):
        try:
            found[tile] = time_us(tile)
        except (OutOfResources, PTXASError, CompilationError):
            continue
        except RuntimeError as error:
            if "PassManager" not in str(error):  # how the compiler says that it cannot
                raise
    best = min(found, key=found.__getitem__)
    console.print(f"  {found[best]:.1f} us: {tuple(best)} of {len(found)}", highlight=False)
    return best


def expert_row(
    weights: Weights, hidden: int, ffn: int, n_experts: int, top_k: int, most: int | None, bm: int
) -> dict[str, Any]:
    """The row of the table for up to `most` pairs of an expert."""
    console.print(
        f"experts {weights}, {hidden} x {ffn}, up to {most or 'any number of'} pairs of each", highlight=False
    )
    n_tokens = max(1, (most or _MANY) * n_experts // top_k)
    w13 = torch.empty(n_experts, 2 * ffn, hidden, dtype=torch.bfloat16, device="cuda").normal_(0, hidden**-0.5)
    w2 = torch.empty(n_experts, hidden, ffn, dtype=torch.bfloat16, device="cuda").normal_(0, ffn**-0.5)
    scales: tuple[Tensor | None, Tensor | None] = (None, None)
    if weights != "16":
        w13, w2 = (each.to(E4M3) for each in (w13, w2))
        scales = torch.ones(n_experts, 2 * ffn, device="cuda"), torch.ones(n_experts, hidden, device="cuda")
    slots = Slots(w13, w2, torch.arange(n_experts, dtype=torch.int32, device="cuda"),
                  torch.zeros(n_experts, dtype=torch.int64, device="cuda"), *scales, weights == "8-rows")  # fmt: skip
    x_TD = torch.randn(n_tokens, hidden, device="cuda", dtype=torch.bfloat16)
    given_TD, scale_T = quantized_rows(x_TD) if slots.rows8 else (x_TD, None)
    ids_TK = torch.rand(n_tokens, n_experts, device="cuda").argsort(1)[:, :top_k].contiguous()

    def time_us(up: Tile, down: Tile) -> float:
        return graph_us(lambda i: compute(given_TD, ids_TK, slots, scale_T, ExpertPlan(bm, up, down)), 3, 3)

    start = tiles.expert_plan(tiles.card(x_TD.device), weights, hidden, ffn, most or _MANY)
    whole = weights == "8-rows"  # a scale goes with 128 columns of h: its tiles are as wide, or divide it
    up = fastest(bm, lambda tile: time_us(tile, start.down), lambda tile: not whole or tile.bn == 128)
    down = fastest(bm, lambda tile: time_us(up, tile), lambda tile: not whole or 128 % tile.bk == 0)
    return {"rows": most, "bm": bm, "up": list(up), "down": list(down)}


def linear_row(n: int, k: int, most: int | None, bm: int) -> dict[str, Any]:
    """The row of the table for up to `most` rows."""
    console.print(f"projection {n} x {k}, up to {most or 'any number of'} rows", highlight=False)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(4)]  # more than a cache holds
    x_TK = torch.randn(most or 8 * _MANY, k, device="cuda", dtype=torch.bfloat16)
    best = fastest(
        bm, lambda tile: graph_us(lambda i: linear(x_TK, weights[i % 4], None, None, LinearPlan(bm, tile)), 8, 3)
    )
    return {"rows": most, "bm": bm, "tile": list(best)}


def written(content: dict[str, Any]) -> str:
    """The table with one row a line."""
    lines = ["{", f' "cards": {json.dumps(content["cards"])},', f' "alike": {json.dumps(content["alike"])},']
    kinds = [kind for kind in content if kind not in ("cards", "alike")]
    for kind in kinds:
        cards = []
        for card, shapes in content[kind].items():
            parts = []
            for shape, rows in shapes.items():
                body = ",\n".join(f"    {json.dumps(row)}" for row in rows)
                parts.append(f'   "{shape}": [\n{body}\n   ]')
            cards.append(f'  "{card}": {{\n' + ",\n".join(parts) + "\n  }")
        lines.append(f' "{kind}": {{\n' + ",\n".join(cards) + "\n }" + ("," if kind != kinds[-1] else ""))
    return "\n".join([*lines, "}"]) + "\n"


if __name__ == "__main__":
    typer.run(tune)
