"""`python -m benchmarks.kernels`: the ways to compute one expert on this CPU, at several numbers of rows.

Every call reads another expert's weights, of more bytes in all than a cache keeps, as a decoding step does. Shape
legend: T rows, D hidden, F ffn.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.command import run
from cluster.bench.common import alternate, machine, print_json, print_table
from workers.kernels.memory import use_huge_pages
from workers.kernels.select import ops_for
from workers.kernels.threads import set_threads
from workers.weights import Matrix, format_of

_HIDDEN, _FFN, _EXPERTS = 512, 1792, 32
_ROWS = (1, 2, 4, 16, 256, 2048)
_RUN_WORK = 4e9  # multiply-adds of one run, about; at least two experts, at most all of them
USED = "expertmesh"

Way = Callable[[Tensor, int], Tensor]  # (rows, expert) -> rows


def kernels(
    repeats: Annotated[int, typer.Option(min=1, help="runs of each way, in turn; the median counts")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Milliseconds of one float32 expert and gigabytes of its weights read per second, by way, rows and threads."""
    ways = dict(_ways())
    rows = [
        row
        for threads in sorted({1, len(os.sched_getaffinity(0))})
        for n_rows in _ROWS
        for row in _measure(ways, threads, n_rows, repeats)
    ]
    if as_json:
        sizes = {"hidden": _HIDDEN, "ffn": _FFN, "expert_bytes": _expert_bytes()}
        print_json({"machine": machine(), "repeats": repeats, **sizes, "used": USED, "figures": rows})
    else:
        _show(list(ways), rows)


def _ways() -> Iterator[tuple[str, Way]]:
    """Name and function of every way; all of them hold the same weights, some in a layout of their own."""
    torch.manual_seed(0)
    w13 = [torch.randn(2 * _FFN, _HIDDEN) / _HIDDEN**0.5 for _ in range(_EXPERTS)]
    w2 = [torch.randn(_HIDDEN, _FFN) / _FFN**0.5 for _ in range(_EXPERTS)]
    ops = ops_for("cpu", torch.float32)
    [layer] = ops.layer_experts(1, _EXPERTS, _HIDDEN, _FFN, format_of(torch.float32))
    for weight in w13 + w2:
        use_huge_pages(weight)  # as the weights of a shard are
    for expert in range(_EXPERTS):
        layer.put(expert, Matrix(w13[expert]), Matrix(w2[expert]))

    def ours(x_TD: Tensor, expert: int) -> Tensor:
        return ops.experts(layer, x_TD, torch.arange(len(x_TD)), torch.full((len(x_TD),), expert))

    yield USED, ours
    yield "linear", _swiglu(lambda x_TD, e: F.linear(x_TD, w13[e]), lambda h_TF, e: F.linear(h_TF, w2[e]))
    yield "mm(W, x.T)", _swiglu(lambda x_TD, e: (w13[e] @ x_TD.T).T, lambda h_TF, e: (w2[e] @ h_TF.T).T)
    yield from _onednn(w13, w2)


def _onednn(w13: list[Tensor], w2: list[Tensor]) -> Iterator[tuple[str, Way]]:
    """Weights in oneDNN's own layout, where this torch offers it."""
    try:
        pack, product = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
        packed_w13, packed_w2 = [pack(w, 16) for w in w13], [pack(w, 16) for w in w2]
    except (AttributeError, RuntimeError):
        return
    yield (
        "oneDNN packed",
        _swiglu(
            lambda x_TD, e: product(x_TD, packed_w13[e], None, "none", [], ""),
            lambda h_TF, e: product(h_TF.contiguous(), packed_w2[e], None, "none", [], ""),
        ),
    )


def _swiglu(up: Way, down: Way) -> Way:
    def way(x_TD: Tensor, expert: int) -> Tensor:
        gate_TF, up_TF = up(x_TD, expert).chunk(2, dim=-1)
        return down(F.silu(gate_TF) * up_TF, expert)

    return way


def _expert_bytes() -> int:
    return 3 * 4 * _HIDDEN * _FFN


def _measure(ways: dict[str, Way], threads: int, n_rows: int, repeats: int) -> Iterator[dict[str, Any]]:
    set_threads(threads)
    x_TD = torch.randn(n_rows, _HIDDEN)
    calls = min(_EXPERTS, max(2, round(_RUN_WORK / (n_rows * _expert_bytes() / 4))))
    experts = cycle(range(_EXPERTS))

    def timed(way: Way) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            way(x_TD, next(experts))
        return (time.perf_counter() - begin) / calls

    runs = {f"{name}, {n_rows} rows, {threads} threads": (lambda way=way: timed(way)) for name, way in ways.items()}
    for name, seconds in zip(ways, alternate(runs, repeats).values(), strict=True):
        yield {
            "way": name, "threads": threads, "rows": n_rows, "ms": 1e3 * seconds,
            "gb_per_s": _expert_bytes() / seconds / 1e9, "gflop_per_s": n_rows * _expert_bytes() / 2 / seconds / 1e9,
        }  # fmt: skip


def _show(ways: list[str], rows: list[dict[str, Any]]) -> None:
    for threads in sorted({row["threads"] for row in rows}):
        mine = {(row["rows"], row["way"]): row for row in rows if row["threads"] == threads}
        print_table(
            f"one expert, {_HIDDEN} x {_FFN}, float32, threads: {threads} (ms; GB/s of weights)",
            ["rows", *ways],
            [[str(n), *(f"{mine[n, way]['ms']:.2f} ms {mine[n, way]['gb_per_s']:.1f}" for way in ways)] for n in _ROWS],
        )


if __name__ == "__main__":
    run(kernels)
