"""`expertmesh model`: make checkpoints."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.errors import ExpertMeshError
from cluster.models import resolve
from cluster.state_dir import settle

# The modules that import torch are imported by the commands that need them: every `expertmesh` command imports this.

app = typer.Typer(no_args_is_help=True, help="Make checkpoints: the default model, an upcycled one, a random one.")

Dest = Annotated[Path, typer.Argument(help="directory to write; must not exist or be empty")]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """An error made on purpose ends the command with one line on standard error and exit code 1."""
    try:
        settle(os.environ)
        yield
    except ExpertMeshError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


@app.command()
def default() -> None:
    """Build the default model, unless it is there already, and print its directory."""
    with one_line_errors():
        print(resolve("default"))


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="a hub id (`owner/name`), or `default`")],
    dest: Annotated[Path, typer.Argument(help="directory to put it into")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of the hub")] = None,
) -> None:
    """Put a model into a directory, unless it is there already: what a pod does before it serves."""
    from cluster.models.fetch import fetch_into

    with one_line_errors():
        fetch_into(model, dest, revision)
        print(dest)


@app.command()
def upcycle(
    source: Annotated[Path, typer.Argument(help="dense Llama-architecture checkpoint: directory or GGUF file")],
    dest: Dest,
    experts: Annotated[int, typer.Option(help="copies of each FFN", min=1)] = 8,
    top_k: Annotated[int, typer.Option(help="experts each token goes to", min=1)] = 2,
) -> None:
    """Turn a dense model into a Mixtral with the same answers and routing by the kind of text."""
    from cluster.models.progress import progress_bar
    from cluster.models.upcycle import write_upcycled

    with one_line_errors(), progress_bar(dest.name) as report:
        write_upcycled(source, dest, n_experts=experts, top_k=top_k, progress=report)


@app.command()
def random(
    dest: Dest,
    family: Annotated[str, typer.Option(help="`model_type` of the family")] = "mixtral",
    hidden: Annotated[int, typer.Option(help="hidden size", min=1)] = 64,
    layers: Annotated[int, typer.Option(help="layers", min=1)] = 2,
    heads: Annotated[int, typer.Option(help="attention heads", min=1)] = 4,
    kv_heads: Annotated[int, typer.Option(help="key/value heads", min=1)] = 2,
    head_dim: Annotated[int | None, typer.Option(help="size of a head; default: hidden / heads", min=1)] = None,
    ffn: Annotated[int, typer.Option(help="FFN size of an expert", min=1)] = 96,
    experts: Annotated[int, typer.Option(help="experts of a layer", min=1)] = 8,
    top_k: Annotated[int, typer.Option(help="experts each token goes to", min=1)] = 2,
    vocab: Annotated[int, typer.Option(help="tokens in the vocabulary", min=4)] = 512,
    max_context: Annotated[int, typer.Option(help="longest sequence, tokens", min=1)] = 2048,
    sliding_window: Annotated[int | None, typer.Option(help="tokens a token sees; default: all", min=1)] = None,
    rope_theta: Annotated[float, typer.Option(help="base of the rotary embedding")] = 1e6,
    tie_embeddings: Annotated[bool, typer.Option(help="let the head be the embedding")] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="how numbers are stored")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="another seed is another model")] = 0,
    fused: Annotated[bool, typer.Option(help="all experts of a layer in one tensor")] = False,
    shard_mb: Annotated[int | None, typer.Option(help="split into files of this many MB; default: one", min=1)] = None,
) -> None:
    """Write a random model of given sizes and family, with a small real tokenizer, for tests and benchmarks."""
    import torch

    from cluster.models.random import SMALL, of_family, write_random

    spec = dataclasses.replace(
        SMALL, hidden_size=hidden, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads,
        head_dim=head_dim or hidden // heads, ffn_size=ffn, n_experts=experts, top_k=top_k, vocab_size=vocab,
        max_context=max_context, sliding_window=sliding_window, rope_theta=rope_theta,
        tie_embeddings=tie_embeddings, dtype=getattr(torch, dtype),
    )  # fmt: skip
    shard_bytes = shard_mb * 2**20 if shard_mb else None
    with one_line_errors():
        write_random(dest, of_family(spec, family), seed=seed, fused=fused, shard_bytes=shard_bytes)
