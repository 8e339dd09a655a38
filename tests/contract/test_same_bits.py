"""Every request's log-probabilities, to the last bit, whatever is computed beside it and wherever its experts are.

Would catch a sum whose order depends on the rows of a batch, a chunk, a block, a thread, a worker or a transport; a
repair or a preemption that computes something else the second time; memory of a captured step that is shared.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import Config
from cluster.models.random import SMALL, write_random
from cluster.placement.placement import striped
from cluster.router.build import build_engine
from cluster.router.engine import Engine
from cluster.router.exchange.exchange import Exchange
from cluster.router.params import SamplingParams, TokenLogprobs
from tests.contract.conftest import KINDS
from tests.contract.harness import start_all
from tests.contract.model import Model
from workers.checkpoint import Checkpoint, ExpertWeights
from workers.kernels.cpu.library import usable
from workers.shard import ExpertShard
from workers.spec import ModelSpec
from workers.weights import FORMATS

pytestmark = pytest.mark.skipif(not usable(), reason="the CPU kernels cannot be built here")

SPEC = replace(SMALL, hidden_size=100, head_dim=24, ffn_size=130, n_layers=3, vocab_size=331)
CONFIG = Config(kv_cache_mb=16, block_size=16, max_batch_tokens=2048)
LENGTHS = (1, 2, 3, 5, 7, 8, 13, 15, 16, 17, 21, 31, 32, 33, 40, 47, 55, 63, 64, 65, 90, 111, 128, 150)
NEW_TOKENS = 12


@dataclass(frozen=True)
class OnDisk(Model):
    """The experts of a checkpoint, as the harness of the contract wants them."""

    path: Path = Path()

    def spec(self) -> ModelSpec:
        return Checkpoint(self.path).spec

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        return Checkpoint(self.path).expert(layer, expert, FORMATS["float32"])

    def shard(self, experts: Iterable[tuple[int, int]]) -> ExpertShard:
        shard = ExpertShard(self.spec())
        for layer, expert in experts:
            shard.load(layer, expert, self.weights(layer, expert))
        return shard


@dataclass
class Result:
    """All that a request got."""

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    prompt: tuple[TokenLogprobs | None, ...] = ()


def request(number: int) -> tuple[list[int], SamplingParams]:
    draw = torch.Generator().manual_seed(number)
    prompt_ids = torch.randint(3, SPEC.vocab_size, (LENGTHS[number],), generator=draw).tolist()
    scores = {"logprobs": 4, "prompt_logprobs": 2}
    return prompt_ids, SamplingParams(max_tokens=NEW_TOKENS, seed=number, ignore_eos=True, **scores)


REQUESTS = [request(number) for number in range(len(LENGTHS))]


def finish(engine: Engine, results: dict[str, Result]) -> None:
    while engine.has_work():
        for output in engine.step():
            assert output.error is None, output.error
            result = results[output.request_id]
            result.tokens += output.token_ids
            result.logprobs += output.logprobs
            result.prompt = output.prompt_logprobs or result.prompt


def crowd(engine: Engine, emitted: Sequence[Sequence[int]] | None = None) -> list[Result]:
    """All requests at once; `emitted`: tokens that another router gave them already."""
    results = {str(number): Result([], []) for number in range(len(REQUESTS))}
    for number, (prompt_ids, params) in enumerate(REQUESTS):
        given = () if emitted is None else emitted[number]
        engine.submit(str(number), prompt_ids, params if not given else replace(params, prompt_logprobs=None), given)
    finish(engine, results)
    return list(results.values())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bits") / "random"
    write_random(path, SPEC)
    return path


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[Result]:
    """Every request by itself, in one process, on one thread."""
    with threads(1):
        engine, results = build_engine(CONFIG, checkpoint), {}
        for number, (prompt_ids, params) in enumerate(REQUESTS):
            results[str(number)] = Result([], [])
            engine.submit(str(number), prompt_ids, params)
            finish(engine, results)
    return list(results.values())


class threads:  # noqa: N801
    def __init__(self, n: int) -> None:
        self._n, self._before = n, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self._n)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    with threads(2):
        yield


@pytest.mark.parametrize("budget", [2048, 512, 64, 7])
def test_in_a_crowd_in_chunks(checkpoint: Path, alone: list[Result], budget: int) -> None:
    assert crowd(build_engine(replace(CONFIG, max_batch_tokens=budget), checkpoint)) == alone


def test_preempted(checkpoint: Path, alone: list[Result]) -> None:
    """Blocks for a third of what all sequences need together."""
    per_block = 2 * SPEC.n_layers * CONFIG.block_size * SPEC.n_kv_heads * SPEC.head_dim * 4
    engine = build_engine(replace(CONFIG, kv_cache_mb=1, block_size=4), checkpoint)
    assert per_block * (sum(LENGTHS) + len(LENGTHS) * NEW_TOKENS) / CONFIG.block_size > 2**20
    assert crowd(engine) == alone
    assert engine.stats().preemptions > 0


def test_continued_on_another_router(checkpoint: Path, alone: list[Result]) -> None:
    """As after kill -9 of one: prompt and emitted tokens are computed anew."""
    emitted = [result.tokens[: number % NEW_TOKENS] for number, result in enumerate(alone)]
    for number, (rest, whole) in enumerate(zip(crowd(build_engine(CONFIG, checkpoint), emitted), alone, strict=True)):
        begin = number % NEW_TOKENS
        assert (rest.tokens, rest.logprobs) == (whole.tokens[begin:], whole.logprobs[begin:])


@pytest.mark.parametrize("kind", KINDS)
def test_over_workers_that_are_killed(checkpoint: Path, alone: list[Result], kind: str) -> None:
    """On 1, 2 and 3 workers; the first of several dies in the middle and comes back at another address."""
    for n_workers in (1, 2, 3):
        assert over_workers(kind, checkpoint, n_workers) == alone


def over_workers(kind: str, checkpoint: Path, n_workers: int) -> list[Result]:
    workers = KINDS[kind](OnDisk(SPEC.n_layers, SPEC.n_experts, SPEC.hidden_size, SPEC.ffn_size, path=checkpoint))
    placement = striped(SPEC.n_layers, SPEC.n_experts, ("a", "b", "c")[:n_workers])
    start_all(workers, placement)
    addresses = dict(workers.addresses)
    exchange = Exchange(placement, addresses, workers.transport(), reply_timeout_s=10, rejoin_timeout_s=60)
    dispatches, dispatch = itertools.count(), exchange.dispatch

    def dispatch_or_kill(layer: int, *rows: torch.Tensor) -> Any:
        if next(dispatches) == 2 * SPEC.n_layers + 1 and n_workers > 1:  # the second layer of the third step
            workers.kill("a")
            threading.Timer(0.2, revive).start()
        return dispatch(layer, *rows)

    def revive() -> None:
        workers.start("a", placement.shard("a"))
        exchange.publish(placement, dict(workers.addresses))

    exchange.dispatch = dispatch_or_kill  # type: ignore[method-assign]
    try:
        results = crowd(build_engine(CONFIG, checkpoint, exchange))
        assert n_workers == 1 or exchange.counters.repairs > 0, "nothing was lost"
        return results
    finally:
        exchange.close()
        workers.close()
