"""`expertmesh generate "prompt"`: one process, experts and all. The quickest check of a model, and the oracle."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.errors import ExpertMeshError
from cluster.models import resolve
from cluster.models.cli import one_line_errors
from cluster.router.params import SamplingParams, StepOutput
from cluster.state_dir import settle

if TYPE_CHECKING:  # they import torch, which every other command can do without
    from cluster.gateway.tokenizer import Tokenizer
    from cluster.router.engine import Engine

_ELSE = "; default: the checkpoint's, else"


def generate(
    prompt: Annotated[str, typer.Argument(help="what to say to the model; - reads standard input")],
    model: Annotated[str | None, typer.Option(help="`default`, a checkpoint directory, or a hub id")] = None,
    max_tokens: Annotated[int | None, typer.Option(help=f"most tokens of the answer{_ELSE} 256", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help=f"0: always the likeliest token{_ELSE} 0")] = None,
    top_k: Annotated[int | None, typer.Option(help=f"draw from the k likeliest; 0: off{_ELSE} 0")] = None,
    top_p: Annotated[float | None, typer.Option(help=f"draw from the likeliest with this share{_ELSE} 1")] = None,
    min_p: Annotated[
        float | None, typer.Option(help=f"draw from those this likely, relative to the likeliest{_ELSE} 0")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help=f"above 1: fewer tokens that were there before{_ELSE} 1")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of the draws; default: another one each time", min=0)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="text that ends the answer; may be repeated")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="go on after the end of the answer")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="continue the text as it is, without the chat template")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object at the end")] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file with options")] = None,
) -> None:
    """Answer one prompt in this process: no cluster, no server."""
    from cluster.config_load import load
    from workers.cores import available_cores
    from workers.kernels.threads import process_environment, set_threads

    with one_line_errors():
        settings = load({"model": model}, os.environ, config).config
        settle(os.environ, settings.state_dir)
        directory = resolve(settings.model)
        threads = settings.router_threads or available_cores()
        os.environ.update(process_environment(threads))  # before torch is imported
        from cluster.gateway.defaults import SamplingDefaults, read_defaults
        from cluster.gateway.tokenizer import Tokenizer
        from cluster.gateway.vocabulary import check_rows
        from cluster.router.build import build_engine
        from workers.checkpoint import Checkpoint

        defaults = read_defaults(directory) if settings.generation_defaults else SamplingDefaults()
        asked = SamplingDefaults(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
            repetition_penalty=repetition_penalty, max_new_tokens=max_tokens,
        )  # fmt: skip
        sampling = {"max_new_tokens": 256, "temperature": 0.0} | defaults.named() | asked.named()
        tokenizer = Tokenizer(directory)
        rows = Checkpoint(directory).spec.vocab_size
        if note := check_rows(tokenizer, rows):
            print(f"note: {note}", file=sys.stderr)
        prompt_ids, raw = encode(tokenizer, sys.stdin.read() if prompt == "-" else prompt, raw)
        set_threads(threads)
        engine = build_engine(settings, directory)
        params = SamplingParams(
            max_tokens=max(1, min(sampling.pop("max_new_tokens"), engine.max_context - len(prompt_ids))),
            **sampling,
            seed=secrets.randbits(63) if seed is None else seed,
            stop_ids=() if ignore_eos else tuple(sorted(i for i in tokenizer.eos_ids if i < rows)),
            ignore_eos=ignore_eos,
        )
        show = (lambda text: None) if as_json else (lambda text: print(text, end="", flush=True))
        result = answer(engine, tokenizer, prompt_ids, params, stop or (), after_text=raw, show=show)
        print(json.dumps(result) if as_json else "")


def encode(tokenizer: Tokenizer, prompt: str, raw: bool) -> tuple[list[int], bool]:
    """The prompt as token ids, and whether it is a text to be continued: as asked for, or as a base model has it."""
    if raw or not tokenizer.chat_templates:
        return tokenizer.encode(prompt), True
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    return tokenizer.encode(text, add_special_tokens=False), False


def answer(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    stops: Sequence[str],
    *,
    after_text: bool,
    show: Callable[[str], object],
) -> dict[str, Any]:
    """Generate one answer, `show` its text piece by piece, and tell all about it.

    Raises RequestError for what cannot be asked, ExpertMeshError when the model fails.
    """
    from cluster.gateway.sequence_text import SequenceText

    text, finish = "", None
    token_ids: list[int] = []
    sequence_text = SequenceText(tokenizer.detokenizer(after_text=after_text), stops)
    start = time.perf_counter()
    for output in outputs(engine, prompt_ids, params):
        token_ids += output.token_ids
        delta = sequence_text.feed(output)
        text += delta.text
        show(delta.text)
        if (finish := delta.finish) is not None:
            break
    return {
        "text": text,
        "finish_reason": finish,
        "prompt_ids": list(prompt_ids),
        "token_ids": token_ids,
        "seed": params.seed,
        "seconds": round(time.perf_counter() - start, 3),
    }


def outputs(engine: Engine, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[StepOutput]:
    """What the steps give the one request."""
    engine.submit("", prompt_ids, params)
    while engine.has_work():
        for output in engine.step():
            if output.finish == "error":
                raise output.error or ExpertMeshError("the sequence was ended")
            yield output
