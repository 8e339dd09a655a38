"""`expertmesh bench gpu`: this card's ceilings, then our engine beside its floor and beside transformers."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.bench.common import console, print_json, print_table
from cluster.errors import ExpertMeshError

if TYPE_CHECKING:  # torch takes a second, which other commands need not wait for
    from cluster.bench.gpu.ceilings import Ceilings

BATCHES, QUICK_BATCHES = (1, 8, 16, 32, 64, 128, 256), (1, 16, 64)
PREFILLS, QUICK_PREFILLS = (512, 2048, 8192), (2048,)
EXCHANGES, QUICK_EXCHANGES = (1, 64, 256), (64,)  # rows of a step whose experts are in other processes
_DTYPES = ("bfloat16", "fp8", "fp8-rows")
_BLOCKS = 256 * 34 + 600  # of the KV cache: the largest batch


def gpu(
    layers: Annotated[int, typer.Option(min=1, help="layers of the random Mixtral 8x7B; the whole has 32")] = 32,
    expert_dtype: Annotated[
        list[str] | None,
        typer.Option(help="of the experts' weights: bfloat16, fp8 or fp8-rows, several times; default: the first two"),
    ] = None,
    peers: Annotated[bool, typer.Option(help="transformers on the same weights, in the same run")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="fewer sizes, bfloat16 alone")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Tokens a second on one GPU, without a checkpoint: random weights made on the device."""
    import torch

    if not torch.cuda.is_available():
        raise ExpertMeshError("bench gpu needs an NVIDIA GPU, and torch sees none")
    asked = expert_dtype or list(_DTYPES[:1] if quick else _DTYPES[:2])
    if wrong := [name for name in asked if name not in _DTYPES]:
        raise ExpertMeshError(f"--expert-dtype {wrong[0]}: one of {', '.join(_DTYPES)}")
    result = measure(layers, sorted(set(asked), key=_DTYPES.index), peers, quick)
    if as_json:
        print_json(result)
    else:
        show(result)


def measure(n_layers: int, expert_dtypes: Sequence[str], peers: bool, quick: bool) -> dict[str, Any]:
    """Everything that the tables show. transformers computes in bfloat16, whatever stands beside it."""
    import torch

    from cluster.bench.gpu import layers
    from cluster.bench.gpu.ceilings import Ceilings
    from cluster.bench.gpu.exchange import in_a_process as exchange_in_a_process

    exchange = {n: exchange_in_a_process(min(n_layers, 8), n) for n in (QUICK_EXCHANGES if quick else EXCHANGES)}
    top = Ceilings.measure()
    console.print(f"copy {top.copy / 1e9:.0f} GB/s, bf16 {top.bf16 / 1e12:.0f} TFLOP/s", highlight=False)
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__, "layers": n_layers,
        "ceilings": asdict(top), "exchange": exchange, "experts_us": layers.experts_us(), "models": {},
    }  # fmt: skip
    theirs: dict[str, dict[int, float | None]] = {}
    for name in expert_dtypes:
        _forget()
        found = _of_model(n_layers, name, top, quick, theirs if peers and name == _DTYPES[0] else None)
        for kind, figures in theirs.items():
            for n, figure in figures.items():
                found[kind][n]["transformers"] = figure
        result["models"][name] = found
    return result


def _of_model(
    n_layers: int, expert_dtype: str, top: Ceilings, quick: bool, theirs: dict[str, dict[int, float | None]] | None
) -> dict[str, Any]:
    """Our engine on a model beside its floors; transformers on the same weights fills `theirs`, where it is given."""
    from cluster.bench.gpu import floor
    from cluster.bench.gpu.ours import CONTEXT, STEPS, OurEngine
    from cluster.bench.gpu.random_model import RandomModel, of_depth
    from cluster.bench.gpu.theirs import Transformers
    from workers.weights import FORMATS

    batches, prefills = (QUICK_BATCHES, QUICK_PREFILLS) if quick else (BATCHES, PREFILLS)
    spec = of_depth(n_layers)
    model = RandomModel(spec, _BLOCKS, weight_format=FORMATS[expert_dtype])
    engine = OurEngine(model, max(batches), 8192)
    console.print(f"{expert_dtype}: captured in {engine.capture_seconds:.1f} s", highlight=False)
    weight_bytes = model.shard.expert_bytes
    found: dict[str, Any] = {"capture_seconds": round(engine.capture_seconds, 1)}
    found["decode"] = {
        n: {
            "expertmesh": engine.decode(n),
            "floor": n / floor.decode_s(spec, n, CONTEXT - STEPS // 2, weight_bytes, top),
        }
        for n in batches
    }
    found["decode_drawn"] = {n: engine.decode(n, temperature=0.8) for n in batches[-1:]}
    found["prefill_ms"] = {
        n: {"expertmesh": min(engine.prefill(n) for _ in range(4)),
            "floor": 1000 * floor.prefill_s(spec, n, weight_bytes, top)}
        for n in prefills
    }  # fmt: skip
    if theirs is not None:
        del engine
        _forget()
        reference = Transformers(model.transformers(), spec.vocab_size)
        theirs["decode"] = {n: _or_none(reference.decode, n) for n in batches}
        theirs["prefill_ms"] = {n: _or_none(reference.prefill, n) for n in prefills}
    return found


def _forget() -> None:
    """Give the GPU what nobody has any more."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _or_none(run: Any, size: int) -> float | None:
    """A figure, or none where memory does not suffice."""
    import torch

    try:
        return float(run(size))
    except torch.OutOfMemoryError as error:
        console.print(f"transformers at {size}: {str(error).splitlines()[0]}", highlight=False)
        return None
    finally:
        _forget()


def show(result: dict[str, Any]) -> None:
    """One table for each kind of figure."""
    console.print(f"{result['card']}, {result['layers']} layers", highlight=False)
    header = ["expertmesh", "floor", "of the floor", "transformers, captured"]
    for name, found in result["models"].items():
        decode = [
            [str(n), f"{f['expertmesh']:,.0f}", f"{f['floor']:,.0f}", f"{f['expertmesh'] / f['floor']:.2f}", _peer(f)]
            for n, f in found["decode"].items()
        ]
        print_table(f"experts {name}: decoding, tokens/s up to a context of 512", ["batch", *header], decode)
        prefill = [
            [str(n), f"{f['expertmesh']:,.1f}", f"{f['floor']:,.1f}", f"{f['floor'] / f['expertmesh']:.2f}", _peer(f)]
            for n, f in found["prefill_ms"].items()
        ]
        print_table(f"experts {name}: prompts, ms", ["tokens", *header], prefill)
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
    rows = [
        [str(n), f"{f['expertmesh']:,.0f}", f"{f['grouped_mm']:,.0f}", f"{f['grouped_mm'] / f['expertmesh']:.2f}x"]
        for n, f in result["experts_us"].items()
    ]
    print_table("a layer's experts, us", ["rows", "expertmesh", "torch._grouped_mm", ""], rows)


def _peer(figures: dict[str, Any]) -> str:
    theirs = figures.get("transformers")
    return "" if theirs is None else f"{theirs:,.1f}"
