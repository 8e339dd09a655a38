"""The command `expertmesh plan`."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer
from rich.console import Console


def plan(
    model: Annotated[str, typer.Option(help="checkpoint directory, config.json, hub id, mixtral-8x7b, mixtral-8x22b")],
    gpu: Annotated[str, typer.Option(help="b200, h200, h100, a100-80, a100-40, l40s, a10g, l4, or a YAML file")],
    target: Annotated[
        list[str] | None,
        typer.Option(help='what to reach: "2000 tok/s" of all sequences, "30 ms" per token; may be given twice'),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="exactly so many; default: the fewest that do", min=1, max=128)
    ] = None,
    sequences: Annotated[int, typer.Option(help="open at once", min=1)] = 64,
    context: Annotated[int, typer.Option(help="tokens of a sequence, on average", min=1)] = 4096,
    expert_dtype: Annotated[
        Literal["bfloat16", "fp8", "fp8-rows"], typer.Option(help="what experts' weights are kept in")
    ] = "bfloat16",
    gpu_memory_utilization: Annotated[float, typer.Option(help="as of `serve`", min=0.05, max=1.0)] = 0.9,
    output: Annotated[
        Literal["table", "json", "values"], typer.Option("--output", "-o", help="values: for the Helm chart")
    ] = "table",
) -> None:
    """How many routers and expert workers a model needs, and what they will give: arithmetic, nothing is started."""
    from cluster.plan.gpu_types import gpu_type
    from cluster.plan.known_models import spec_of_model
    from cluster.plan.model_size import ModelSize
    from cluster.plan.ours import Load
    from cluster.plan.recommend import parse_targets, recommend
    from cluster.plan.show import as_json, chart_values, show
    from workers.weights import FORMATS

    size = ModelSize(spec_of_model(model), FORMATS[expert_dtype])
    load = Load(sequences, context)
    layout = recommend(size, gpu_type(gpu), load, parse_targets(target or []), gpus, gpu_memory_utilization)
    if output == "json":
        typer.echo(json.dumps(as_json(layout, load)))
    elif output == "values":
        typer.echo(chart_values(layout, load, model), nl=False)
    else:
        show(layout, load, Console(soft_wrap=True))
