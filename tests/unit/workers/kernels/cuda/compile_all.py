"""Compiles every GPU kernel without a GPU, through the launches that production makes: `python compile_all.py sm_90`.

A driver that only names the target stands in for CUDA's. Prints what does not compile or takes more shared memory than
the card has, and fails then.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch
import triton.runtime.jit
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from workers.gate_spec import GateSpec
from workers.kernels.cuda import attention, launch, rows, sampling, tiles
from workers.kernels.cuda.experts import E4M3, Slots, compute, quantized_rows
from workers.kernels.cuda.linear import linear
from workers.kernels.ops import Unsummed
from workers.transport.device.launch import Asked, CudaLaunch, Taken, Turn
from workers.transport.device.rows import Layout, StepRows

TARGETS = {"sm_80": ((8, 0), ("A100",)), "sm_89": ((8, 9), ("L40S", "")), "sm_90": ((9, 0), ("H200",)),
           "sm_100": ((10, 0), ("B200",))}  # fmt: skip
SHARED = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448}  # bytes a program may have

found: dict[str, int] = {}
failed: list[str] = []


class NamesTheTarget:
    """What the compiler asks of a driver."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(run: Any) -> Any:
    """A launch that compiles and notes how much shared memory the kernel takes."""

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = f"{self.__name__} {kwargs}"
        try:
            found[name] = run(self, *args, grid=grid, warmup=True, **kwargs).metadata.shared
        except Exception as error:
            failed.append(f"{name}: {error}")

    return compiled


def on(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype)  # its pages are never touched


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def experts(name: str, hidden: int, ffn: int, n_experts: int, k: int, bits8: bool) -> None:
    """Every tile of the table for this card."""
    for kind in ("16", "8", "8-rows") if bits8 else ("16",):
        dtype = torch.bfloat16 if kind == "16" else E4M3
        scales = (None, None) if kind == "16" else (on(n_experts, 2 * ffn, dtype=torch.float32),
                                                    on(n_experts, hidden, dtype=torch.float32))  # fmt: skip
        slots = Slots(on(n_experts, 2 * ffn, hidden, dtype=dtype), on(n_experts, hidden, ffn, dtype=dtype),
                      ints(n_experts), ints(n_experts, dtype=torch.int64), *scales, kind == "8-rows")  # fmt: skip
        for row in tiles._rows(f"experts {kind}", name, f"{hidden}x{ffn}"):
            plan = tiles.ExpertPlan(row["bm"], tiles.Tile(*row["up"]), tiles.Tile(*row["down"]))
            x = on(16, hidden, dtype=E4M3 if slots.rows8 else torch.bfloat16)
            compute(x, ints(16, k), slots, on(16, dtype=torch.float32) if slots.rows8 else None, plan)


def everything(name: str, capability: tuple[int, int]) -> None:
    experts(name, 4096, 14336, 8, 2, capability >= (8, 9))
    experts(name, 2048, 768, 128, 8, False)
    big = ints(4096, 8)
    compute(on(4096, 2048), big, Slots(on(4, 1536, 2048), on(4, 2048, 768), ints(128), ints(128, dtype=torch.int64)))
    for row in tiles._rows("linear", name, "any"):
        plan = tiles.LinearPlan(row["bm"], tiles.Tile(*row["tile"]))
        linear(on(300, 4096), on(6144, 4096), None, None, plan)
        linear(on(300, 2880), on(5120, 2880), on(5120, dtype=torch.float32), torch.float32, plan)
    for d, h, g in ((64, 32, 8), (80, 32, 32), (96, 24, 8), (128, 32, 8), (128, 64, 4), (256, 16, 8)):
        k, v = on(64, 16, g, d), on(64, 16, g, d)
        sequence, position, table = ints(40, dtype=torch.int64), ints(40, dtype=torch.int64), ints(9, 64)
        for window, starts in ((None, (0, 1, 20, 40)), (1024, (0, 1, 2))):
            who = attention.who(sequence, position, table, starts, attention.tile_rows(h, g, d), 16)
            attention.attend(on(40, h, d), k, v, who, attention.make_items(who, h, d, window), 0.1, window)
        for norm in (None, on(d), on(h * d)):
            k_norm = None if norm is None else norm if len(norm) == d else on(g * d)
            angle = on(40, d, dtype=torch.float32)
            rows.rotary_write(on(40, (h + 2 * g) * d), sequence, angle, angle, k, v, norm, k_norm, 1e-5)
    for d, e, choice in ((4096, 8, GateSpec(2)), (2880, 8, GateSpec(4, "sigmoid", False))):
        live, bias = ints(1), None if d == 4096 else on(e, dtype=torch.float32)
        asked = rows.add_norm(on(4, d), on(4, d), on(d), 1e-5, 1.0, on(e, d), choice, bias, live)
        assert asked.weights_TK is not None
        more = Unsummed(on(8 * choice.top_k, d), ints(4, choice.top_k), asked.weights_TK)
        rows.add_norm(on(4, d), more, on(d), 1e-5)
        rows.weighted_sum(more, torch.bfloat16)
    if capability >= (8, 9):
        quantized_rows(on(4, 2880))
    rows.choose(on(4, 256, dtype=torch.float32), GateSpec(8, "sigmoid"), on(256, dtype=torch.float32))
    n = ints(4)
    longs = ints(4, dtype=torch.int64)
    doubles = on(4, dtype=torch.float64)
    how = sampling.Draws(longs, longs, doubles, longs, doubles, doubles, longs, longs)
    sampling.draw(on(4, 151936, dtype=torch.float32), how, n)
    steps(4096, 2)
    steps(2880, 6)


def steps(hidden: int, k: int) -> None:
    """Both ends of a layer through device memory."""
    layout = Layout(8, k, hidden, torch.bfloat16, 32)
    shared, one = StepRows(ints(layout.n_bytes, dtype=torch.uint8), layout), ints(1, dtype=torch.int64)
    n, turn, launched = ints(32, dtype=torch.int64), Turn(one, one, 1), CudaLaunch(1.0)
    asked, ids_TK = Asked(ints(2, 8, dtype=torch.int64), n, n), ints(4, k, dtype=torch.int64)
    launched.ask(shared, turn, on(4, hidden), ids_TK, ints(2, 8), asked)
    launched.await_done(shared, turn, asked)
    launched.take(shared, turn, 1, on(4, hidden), ints(4, k), Taken(one, one))
    launched.give(shared, turn, 1, on(4 * k, hidden), ints(4 * k), ints(4 * k))


def main(target: str) -> None:
    capability, names = TARGETS[target]
    driver.set_active(NamesTheTarget(GPUTarget("cuda", 10 * capability[0] + capability[1], 32)))
    run = triton.runtime.jit.JITFunction.run
    with mock.patch.object(triton.runtime.jit.JITFunction, "run", compile_only(run)), \
         mock.patch.object(launch, "capability", lambda device: capability):  # fmt: skip
        for name in names:
            everything(name, capability)
    large = {name: shared for name, shared in found.items() if shared > SHARED[target]}
    print(f"{target}: {len(found)} kernels; too much shared memory: {large or 'none'}; failed: {failed or 'none'}")
    sys.exit(bool(large or failed))


if __name__ == "__main__":
    main(sys.argv[1])
