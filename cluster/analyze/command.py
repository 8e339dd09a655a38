"""`expertmesh analyze`: the routing report of a model over texts by domain."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import ExpertMeshError, TextError
from cluster.models import resolve
from cluster.models.cli import one_line_errors

_TRACE = "trace.jsonl"


def analyze(
    texts: Annotated[
        list[Path],
        typer.Argument(metavar="TEXT...", help="a domain each: a text file, *.jsonl, or a directory of them"),
    ],
    out: Annotated[Path, typer.Option(help="directory for report.html, analysis.json, the charts and the trace")],
    model: Annotated[str | None, typer.Option(help="`default`, a checkpoint directory, or a hub id")] = None,
    layers: Annotated[
        str | None, typer.Option(help="layers that charts and colours show, by commas; default: first, middle, last")
    ] = None,
    tokens: Annotated[int, typer.Option(help="most tokens of each domain; 0: all", min=0)] = 0,
    config: Annotated[Path | None, typer.Option(help="YAML file with options of `serve`")] = None,
) -> None:
    """Which tokens go to which expert, by layer and domain; by syntax or by topic. In this process: no cluster."""
    from cluster.analyze.texts import read_domains
    from cluster.config_load import load
    from workers.cores import available_cores
    from workers.kernels.threads import process_environment, set_threads

    with one_line_errors():
        from cluster.analyze.charts import write_charts  # says what to install before the model runs

        settings = load({"model": model}, os.environ, config).config
        domains = read_domains(texts)
        directory = resolve(settings.model)
        threads = settings.router_threads or available_cores()
        os.environ.update(process_environment(threads))  # before torch is imported
        from cluster.analyze.analysis import analyse
        from cluster.analyze.recording import record
        from cluster.analyze.report import render
        from cluster.gateway.tokenizer import Tokenizer
        from cluster.models.progress import progress_bar
        from cluster.router.build import build_model
        from cluster.router.sizing import context_limit
        from cluster.routing.trace import Header, Window, append
        from workers.checkpoint import Checkpoint

        spec = Checkpoint(directory).spec
        sparse = sorted({layer for layer, _ in spec.experts})
        if not sparse:
            raise ExpertMeshError(f"{directory}: this model has no experts, so nothing is routed")
        shown = [sparse.index(layer) for layer in _layers(layers, sparse)]
        out.mkdir(parents=True, exist_ok=True)
        set_threads(threads)
        tokenizer, decoder = Tokenizer(directory), build_model(settings, directory)
        began = time.time()
        with progress_bar(directory.name) as report:
            recording = record(
                decoder, tokenizer, domains, most_tokens=tokens, max_batch_tokens=settings.max_batch_tokens,
                max_context=context_limit(settings, spec, decoder.cache.n_blocks), progress=report,
            )  # fmt: skip
        seconds = time.time() - began
        analysis = analyse(directory.name, spec.n_experts, sparse, recording)
        charts = write_charts(analysis, shown, out)
        (out / "analysis.json").write_text(json.dumps(analysis.to_json(), indent=1) + "\n", encoding="utf-8")
        (out / "report.html").write_text(
            render(analysis, recording, tokenizer, shown, charts), encoding="utf-8", errors="replace"
        )
        (out / _TRACE).unlink(missing_ok=True)
        header = Header(directory.name, spec.n_layers, spec.n_experts, spec.top_k, 1.0)
        for name, counts in zip(analysis.domains, analysis.counts, strict=True):
            append(out / _TRACE, header, Window(name, began, seconds, counts))
        share = analysis.syntax_share
        said = f"{share:.0%} by syntax, {1 - share:.0%} by topic" if share is not None else "see the report"
        print(f"{len(recording.ids_N)} tokens in {seconds:.1f} s: {said}", file=sys.stderr)
        print(out / "report.html")


def _layers(given: str | None, sparse: list[int]) -> list[int]:
    """The layers to show. Raises TextError for others than those that have experts."""
    if given is None:
        return sorted({sparse[0], sparse[len(sparse) // 2], sparse[-1]})
    try:
        wanted = sorted({int(part) for part in given.split(",")})
    except ValueError:
        raise TextError(f"--layers {given}: numbers by commas are expected, as in 0,15,31") from None
    if missing := [layer for layer in wanted if layer not in sparse]:
        raise TextError(f"--layers {given}: layer {missing[0]} has no experts; those that do: {_ranges(sparse)}")
    return wanted


def _ranges(numbers: list[int]) -> str:
    whole = numbers[-1] - numbers[0] == len(numbers) - 1
    return f"{numbers[0]} to {numbers[-1]}" if whole else ", ".join(map(str, numbers))
