"""`expertmesh bench gpu`: this card's ceilings, then our engine beside its floor and beside transformers."""

from __future__ import annotations

import gc
from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer

from cluster.bench.common import console, print_json, print_table
from cluster.errors import ExpertMeshError

BATCHES, QUICK_BATCHES = (1, 8, 16, 32, 64, 128, 256), (1, 16, 64)
PREFILLS, QUICK_PREFILLS = (512, 2048, 8192), (2048,)
EXCHANGES, QUICK_EXCHANGES = (1, 64, 256), (64,)  # rows of a step whose experts are in other processes
_BLOCKS = 256 * 34 + 600  # of the KV cache: the largest batch


def gpu(
    layers: Annotated[int, typer.Option(min=1, help="layers of the random Mixtral 8x7B; the whole has 32")] = 32,
    expert_dtype: Annotated[
        Literal["bfloat16", "fp8", "fp8-rows"], typer.Option(help="what experts' weights are kept in")
    ] = "bfloat16",
    peers: Annotated[bool, typer.Option(help="transformers on the same weights, in the same run")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="fewer sizes")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Tokens a second on one GPU, without a checkpoint: random weights made on the device."""
    import torch

    if not torch.cuda.is_available():
        raise ExpertMeshError("bench gpu needs an NVIDIA GPU, and torch sees none")
    result = measure(layers, expert_dtype, peers, quick)
    if as_json:
        print_json(result)
    else:
        show(result)


def measure(n_layers: int, expert_dtype: str, peers: bool, quick: bool) -> dict[str, Any]:
    """Everything that the table shows."""
    import torch

    from cluster.bench.gpu import floor, layers
    from cluster.bench.gpu.ceilings import Ceilings
    from cluster.bench.gpu.exchange import in_a_process as exchange_in_a_process
    from cluster.bench.gpu.ours import CONTEXT, STEPS, OurEngine
    from cluster.bench.gpu.random_model import RandomModel, of_depth
    from cluster.bench.gpu.theirs import Transformers
    from workers.weights import FORMATS

    exchange = {n: exchange_in_a_process(min(n_layers, 8), n) for n in (QUICK_EXCHANGES if quick else EXCHANGES)}
    top = Ceilings.measure()
    console.print(f"copy {top.copy / 1e9:.0f} GB/s, bf16 {top.bf16 / 1e12:.0f} TFLOP/s", highlight=False)
    batches, prefills = (QUICK_BATCHES, QUICK_PREFILLS) if quick else (BATCHES, PREFILLS)
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__, "layers": n_layers,
        "expert_dtype": expert_dtype, "ceilings": asdict(top), "exchange": exchange,
    }  # fmt: skip
    if expert_dtype == "bfloat16":
        result["experts_us"] = layers.experts_us()
        gc.collect()
        torch.cuda.empty_cache()
    spec = of_depth(n_layers)
    model = RandomModel(spec, _BLOCKS, weight_format=FORMATS[expert_dtype])
    engine = OurEngine(model, max(batches), 8192)
    result["capture_seconds"] = round(engine.capture_seconds, 1)
    console.print(f"captured in {engine.capture_seconds:.1f} s", highlight=False)
    weight_bytes = model.shard.expert_bytes
    result["decode"] = {
        n: {
            "expertmesh": engine.decode(n),
            "floor": n / floor.decode_s(spec, n, CONTEXT - STEPS // 2, weight_bytes, top),
        }
        for n in batches
    }
    result["decode_drawn"] = {n: engine.decode(n, temperature=0.8) for n in batches[-1:]}
    result["prefill_ms"] = {
        n: {"expertmesh": min(engine.prefill(n) for _ in range(4)),
            "floor": 1000 * floor.prefill_s(spec, n, weight_bytes, top)}
        for n in prefills
    }  # fmt: skip
    if peers and expert_dtype == "bfloat16":
        del engine
        gc.collect()
        torch.cuda.empty_cache()
        reference = Transformers(model.transformers(), spec.vocab_size)
        for n, figures in result["decode"].items():
            figures["transformers"] = _or_none(reference.decode, n)
        for n, figures in result["prefill_ms"].items():
            figures["transformers"] = _or_none(reference.prefill, n)
    return result


def _or_none(run: Any, size: int) -> float | None:
    """A figure, or none where memory does not suffice."""
    import torch

    try:
        return float(run(size))
    except torch.OutOfMemoryError as error:
        console.print(f"transformers at {size}: {str(error).splitlines()[0]}", highlight=False)
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def show(result: dict[str, Any]) -> None:
    """One table for each kind of figure."""
    console.print(f"{result['card']}, {result['layers']} layers, experts {result['expert_dtype']}", highlight=False)
    decode = [
        [str(n), f"{f['expertmesh']:,.0f}", f"{f['floor']:,.0f}", f"{f['expertmesh'] / f['floor']:.2f}", _peer(f)]
        for n, f in result["decode"].items()
    ]
    header = ["expertmesh", "floor", "of the floor", "transformers, captured"]
    print_table("decoding, tokens/s up to a context of 512", ["batch", *header], decode)
    prefill = [
        [str(n), f"{f['expertmesh']:,.1f}", f"{f['floor']:,.1f}", f"{f['floor'] / f['expertmesh']:.2f}", _peer(f)]
        for n, f in result["prefill_ms"].items()
    ]
    print_table("prompts, ms", ["tokens", *header], prefill)
    rows = []
    for n, found in result["exchange"].items():
        if isinstance(found, str):
            console.print(f"exchange of {n} rows: {found}", highlight=False)
            continue
        rows += [
            [str(n), name, f"{f['us_a_layer']:,.1f}", f"{f['ratio']:.2f}", "yes" if f["same_bits"] else "no"]
            for name, f in found["transports"].items()
        ]
    if rows:
        header = ["rows", "transport", "us a layer", "of one process", "same bits"]
        print_table("experts in two other processes of this GPU", header, rows)
    if "experts_us" in result:
        rows = [
            [str(n), f"{f['expertmesh']:,.0f}", f"{f['grouped_mm']:,.0f}", f"{f['grouped_mm'] / f['expertmesh']:.2f}x"]
            for n, f in result["experts_us"].items()
        ]
        print_table("a layer's experts, us", ["rows", "expertmesh", "torch._grouped_mm", ""], rows)


def _peer(figures: dict[str, Any]) -> str:
    theirs = figures.get("transformers")
    return "" if theirs is None else f"{theirs:,.1f}"
