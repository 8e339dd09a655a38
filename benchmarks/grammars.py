"""`python -m benchmarks.grammars`: what following a grammar costs a step loop, and what libraries take for a mask."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks.command import run
from benchmarks.engine import random_model
from benchmarks.engine_runner import CONFIG
from benchmarks.grammar_libraries import SCHEMA, compare
from benchmarks.workload import DECODE_PROMPT, prompts
from cluster.bench.common import print_table
from cluster.errors import ExpertMeshError
from cluster.router import grammar
from cluster.router.build import build_model
from cluster.router.compute import Computed, Draw, Drawn, Experts, HostCompute, Logits
from cluster.router.engine import Engine
from cluster.router.grammar import GrammarCompiler
from cluster.router.params import SamplingParams
from cluster.router.sequence import Sequence
from workers.model.batch import Batch
from workers.model.decoder import Decoder

BATCH = 16
_STEPS = 64  # of a run


def grammars(
    model: Annotated[
        Path | None, typer.Option(help="checkpoint directory; default: a random one of 200 million parameters")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="runs of 64 steps, of all of which the median counts")] = 9,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token")] = 0.0,
    masks: Annotated[bool, typer.Option(help="the libraries' masks instead of the step loop")] = False,
) -> None:
    """Decoding of 16 sequences that follow a JSON schema: what every other step takes, in which nothing is masked, and
    what those between take; with --masks what libraries take."""
    if masks:
        print_table("grammars", ("vocabulary, grammar", "library", "compile ms", "mask us", "p99", "MB"), compare())
        return
    directory = model or random_model()
    decoder = build_model(CONFIG, directory)
    compute = EveryOther(decoder)
    spec = decoder.spec
    engine = Engine(decoder, CONFIG, GrammarCompiler(directory, spec.vocab_size, spec.eos_ids), compute)
    wanted = SamplingParams(1 + _STEPS, temperature=temperature, grammar=grammar.from_json_schema(SCHEMA))
    compute.record, _ = _run(engine, wanted, compute)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        tokens, took = _run(engine, wanted, compute)
        if tokens != compute.record:
            raise ExpertMeshError("the tokens are not those of the first run")
        for follows, each in took:
            seconds[follows].append(each)
    free, followed = median(seconds[False]), median(seconds[True])
    print(f"a step of {BATCH} takes {free * 1e3:.2f} ms, with a grammar {followed * 1e3:.2f} ms: "
          f"it costs {1 - free / followed:.1%} of the throughput")  # fmt: skip


Answers = dict[str, list[int]]


def _run(engine: Engine, wanted: SamplingParams, compute: EveryOther) -> tuple[Answers, list[tuple[bool, float]]]:
    """The answers, and of each decoding step whether it followed the grammar and the seconds that it took."""
    answers: Answers = {}
    took: list[tuple[bool, float]] = []
    for i, ids in enumerate(prompts(BATCH, DECODE_PROMPT, engine.model.spec.vocab_size)):
        engine.submit(str(i), ids, replace(wanted, seed=i))
    while engine.has_work():
        start = time.perf_counter()
        outputs = engine.step()
        elapsed = time.perf_counter() - start
        for output in outputs:
            answers.setdefault(output.request_id, []).extend(output.token_ids)
        if len(outputs) == BATCH and len(answers["0"]) > 1:
            took.append((compute.follows, elapsed))
    return answers, took


class EveryOther(HostCompute):
    """Follows grammars in every other step. In those between tokens are drawn without, and a record's are given: which
    experts compute, and so what a step takes, depends on the tokens."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self.record: Answers = {}  # empty: there is none yet, and every step follows
        self.follows = True  # the last step
        self._free: dict[str, Sequence] = {}

    def start(self, step: int, batch: Batch, seats: Items[int], draws: Items[Draw]) -> Computed:
        """As `HostCompute`."""
        known = all(sequence.request_id in self.record and sequence.n_emitted for _, sequence in draws)
        self.follows = not (self.follows and known)
        if self.follows:
            return super().start(step, batch, seats, draws)
        given = [self.record[sequence.request_id][sequence.n_emitted] for _, sequence in draws]
        return _Given(super().start(step, batch, seats, [Draw(row, self._twin(of)) for row, of in draws]), given)

    def _twin(self, sequence: Sequence) -> Sequence:
        """The sequence without its grammar, as it was when it was first asked for."""
        if sequence.request_id not in self._free:
            self._free[sequence.request_id] = Sequence(
                sequence.request_id, sequence.tokens, replace(sequence.params, grammar="")
            )
        return self._free[sequence.request_id]


class _Given:
    def __init__(self, computed: Computed, tokens: Items[int]) -> None:
        self._computed = computed
        self._tokens = tokens

    def drawn(self) -> list[Drawn]:
        return [each._replace(token=token) for each, token in zip(self._computed.drawn(), self._tokens, strict=True)]

    def logits(self, begin: int, end: int) -> Logits:
        return self._computed.logits(begin, end)

    def routing(self, begin: int, end: int) -> Experts:
        return self._computed.routing(begin, end)


if __name__ == "__main__":
    run(grammars)
