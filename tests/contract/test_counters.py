"""The rows that are scraped are those that transformers' gates choose, exactly, over every transport.

Would catch a row that is counted twice when it is sent again after the loss of its worker, one that is not counted, one
counted for another expert or layer, and padding or the last token of an answer, which nobody computes, being counted.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedModel

from cluster.config import Config
from cluster.observe.exposition import Readings, Source, text_of
from cluster.placement.placement import striped
from cluster.router import readings
from cluster.router.build import build_engine
from cluster.router.engine import Engine
from cluster.router.exchange.exchange import Exchange
from cluster.router.params import SamplingParams
from tests.contract.conftest import KINDS
from tests.contract.harness import start_all
from tests.contract.test_same_bits import OnDisk
from tests.reference import gate_choices, gate_margins, random_tokens, save_random
from workers.checkpoint import Checkpoint

CONFIG = Config(kv_cache_mb=16, block_size=4, max_batch_tokens=32)  # prompts come in chunks, with decoding rows beside
LENGTHS = (5, 40, 17, 70, 1)
NEW_TOKENS = 9
TIE = 1e-3  # a gate this undecided may choose otherwise in float32 of another order

Texts = dict[str, list[int]]  # by request: its prompt and its answer
Count = dict[tuple[str, str], float]  # by layer and expert, or layer and worker


@dataclass(frozen=True)
class Truth:
    """What the requests come to in one process, and in transformers."""

    path: Path
    engine: Engine  # that has computed them; it holds the experts itself
    texts: Texts
    rows: Count


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    path = tmp_path_factory.mktemp("counters") / "random"
    reference = save_random(path)
    engine = build_engine(CONFIG, path)
    texts = answers(engine)
    return Truth(path, engine, texts, chosen(reference, texts))


def answers(engine: Engine) -> Texts:
    """Every prompt with its greedy answer, of all requests at once; every other prompt is scored."""
    vocab = engine.model.spec.vocab_size
    tokens = {str(n): random_tokens(vocab, n, seed=n) for n in LENGTHS}
    for name, prompt_ids in tokens.items():
        scores = 0 if is_scored(name) else None
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, prompt_logprobs=scores)
        engine.submit(name, list(prompt_ids), params)
    while engine.has_work():
        for output in engine.step():
            assert output.error is None, output.error
            tokens[output.request_id] += output.token_ids
    return tokens


def is_scored(name: str) -> bool:
    return int(name) % 2 == 1


def chosen(reference: PreTrainedModel, texts: Texts) -> Count:
    """The rows of each expert as transformers routes them. Of an answer's last token there is no row, and in the last
    layer only tokens have one whose logits are wanted."""
    count: Counter[tuple[str, str]] = Counter()
    for name, tokens in texts.items():
        assert gate_margins(reference, tokens[:-1]).min() > TIE, "choose another seed"
        ids_LTK = gate_choices(reference, tokens[:-1])
        for layer, ids_TK in enumerate(ids_LTK):
            first = int(name) - 1 if layer == len(ids_LTK) - 1 and not is_scored(name) else 0
            count.update((str(layer), str(expert)) for expert in ids_TK[first:].ravel().tolist())
    return dict(count)


def scraped(source: Source, name: str, label: str) -> Count:
    """What Prometheus would read of the series `name`."""
    text = text_of(Readings("router-0", [source])).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families[name].samples
    assert len(samples) == len({(s.labels["layer"], s.labels[label]) for s in samples})
    return {(s.labels["layer"], s.labels[label]): s.value for s in samples if s.value}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_transformers(truth: Truth, kind: str) -> None:
    """One of three workers dies in the middle of the prompts and again among the answers, and comes back."""
    path, expected, spec = truth.path, truth.rows, Checkpoint(truth.path).spec
    workers = KINDS[kind](OnDisk(spec.n_layers, spec.n_experts, spec.hidden_size, spec.ffn_size, path=path))
    placement = striped(spec.n_layers, spec.n_experts, ("a", "b", "c"))
    start_all(workers, placement)
    exchange = Exchange(
        placement, dict(workers.addresses), workers.transport(), reply_timeout_s=10, rejoin_timeout_s=60
    )
    dispatches, dispatch, kills = itertools.count(), exchange.dispatch, {4: "a", 8 * spec.n_layers: "b"}

    def dispatch_or_kill(layer: int, *rows: torch.Tensor) -> Any:
        handle = dispatch(layer, *rows)
        if (worker := kills.get(next(dispatches))) is not None:  # after the dispatch: what it was sent is lost
            workers.kill(worker)
            threading.Timer(0.2, revive, [worker]).start()
        return handle

    def revive(worker: str) -> None:
        workers.start(worker, placement.shard(worker))
        exchange.publish(placement, dict(workers.addresses))

    exchange.dispatch = dispatch_or_kill  # type: ignore[method-assign]
    try:
        engine = build_engine(CONFIG, path, exchange)
        assert answers(engine) == truth.texts
        assert exchange.counters.repairs >= 2, "nothing was lost"
    finally:
        exchange.close()
        workers.close()

    def source() -> Iterable[Any]:
        return readings.of_exchange(exchange, per_expert=True)

    assert scraped(source, "expertmesh_expert_tokens", "expert") == expected
    by_worker: Counter[tuple[str, str]] = Counter()
    for (layer, expert), n in expected.items():
        (holder,) = placement.holders(int(layer), int(expert))
        by_worker[layer, holder] += int(n)
    assert scraped(source, "expertmesh_worker_tokens", "worker") == dict(by_worker)
    # The same in what the planner sees.
    assert exchange.load().total == {
        w: sum(n for (_, worker), n in by_worker.items() if worker == w) for w in ("a", "b", "c")
    }
    total = sum(LENGTHS) + (NEW_TOKENS - 1) * len(LENGTHS)
    assert np.all(exchange.counters.rows_LE[:-1].sum(axis=1) == total * spec.top_k)
    assert engine.counters.rows == total


def test_a_router_that_holds_the_experts_counts_them_too(truth: Truth) -> None:
    assert scraped(lambda: readings.of_own_experts(truth.engine), "expertmesh_expert_tokens", "expert") == truth.rows
