"""Every transport gives the sums that the experts define, to the same last bit wherever they live."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from cluster.placement.placement import Placement, striped
from cluster.router.exchange.exchange import Exchange
from tests.contract.harness import Workers, start_all
from tests.contract.model import Batch, Model, batch

MakeWorkers = Callable[[Model], Workers]
MODEL = Model()
NAMES = ("a", "b", "c", "d")
CASES = {
    "uneven counts": batch(MODEL, 37),
    "one token": batch(MODEL, 1),
    "all tokens to one expert": batch(MODEL, 9, k=1, experts=[4]),
    "experts nobody chose": batch(MODEL, 5, experts=[0, 1, 3]),
    "workers nobody chose": batch(MODEL, 5, k=2, experts=[0, 4]),
    "three choices": batch(MODEL, 8, k=3),
    "more experts a token than workers": batch(MODEL, 4, k=6),
    "no tokens": batch(MODEL, 0),
}


def exchange_over(workers: Workers, placement: Placement, dtype: torch.dtype = torch.float32) -> Exchange:
    addresses, transport = workers.addresses, workers.transport()
    return Exchange(placement, addresses, transport, reply_timeout_s=20, rejoin_timeout_s=20, dtype=dtype)


def run(exchange: Exchange, given: Batch, layer: int = 1) -> Tensor:
    return exchange.combine(exchange.dispatch(layer, given.x_TD, given.ids_TK, given.weights_TK))


@pytest.mark.parametrize("case", CASES)
def test_sums_are_right_and_independent_of_the_placement(make_workers: MakeWorkers, case: str) -> None:
    given = CASES[case]
    results = []
    for n_workers in (1, 2, 3, 4):
        placement = striped(MODEL.n_layers, MODEL.n_experts, NAMES[:n_workers])
        workers = make_workers(MODEL)
        start_all(workers, placement)
        results.append(run(exchange_over(workers, placement), given))
    expected_TD = MODEL.reference(1, given.x_TD, given.ids_TK, given.weights_TK)
    torch.testing.assert_close(results[0].double(), expected_TD, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(result, results[0]) for result in results)


def test_replicas_change_no_bit(make_workers: MakeWorkers) -> None:
    replicas = tuple(tuple(((e % 2), 2, 3) if e < 3 else (e % 4,) for e in range(6)) for _ in range(2))
    placement, single = Placement(1, NAMES, replicas), striped(2, 6, ("only",))
    workers = make_workers(MODEL)
    start_all(workers, placement)
    start_all(workers, single)
    replicated, alone = exchange_over(workers, placement), exchange_over(workers, single)
    for seed in range(5):
        given = batch(MODEL, 11, seed=seed)
        assert torch.equal(run(replicated, given), run(alone, given))


def test_the_largest_batch_travels_in_frames(make_workers: MakeWorkers) -> None:
    model = Model(n_layers=1, n_experts=3, hidden_size=1024, ffn_size=8)
    placement = striped(1, 3, ("a", "b"))
    workers = make_workers(model)
    start_all(workers, placement)
    given = batch(model, 4500)
    y_TD = run(exchange_over(workers, placement), given, layer=0)
    assert given.x_TD.nbytes > 16 << 20
    expected_TD = model.reference(0, given.x_TD, given.ids_TK, given.weights_TK)
    torch.testing.assert_close(y_TD.double(), expected_TD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows(make_workers: MakeWorkers, dtype: torch.dtype) -> None:
    model = Model(dtype=dtype)
    placement = striped(2, 6, ("a", "b"))
    workers = make_workers(model)
    start_all(workers, placement)
    given = batch(model, 13)
    y_TD = run(exchange_over(workers, placement, dtype), given)
    assert y_TD.dtype == dtype
    expected_TD = model.reference(1, given.x_TD, given.ids_TK, given.weights_TK)
    torch.testing.assert_close(y_TD.double(), expected_TD, atol=0.05, rtol=0.05)


def test_micro_batches_in_flight_are_combined_in_any_order(make_workers: MakeWorkers) -> None:
    placement = striped(2, 6, NAMES)
    workers = make_workers(MODEL)
    start_all(workers, placement)
    exchange = exchange_over(workers, placement)
    given = [batch(MODEL, 5 + seed, seed=seed) for seed in range(3)]
    handles = [exchange.dispatch(0, each.x_TD, each.ids_TK, each.weights_TK) for each in given]
    for each, handle in reversed(list(zip(given, handles, strict=True))):
        expected_TD = MODEL.reference(0, each.x_TD, each.ids_TK, each.weights_TK)
        torch.testing.assert_close(exchange.combine(handle).double(), expected_TD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_routers", [1, 2, 3])
def test_routers_do_not_disturb_each_other(make_workers: MakeWorkers, n_routers: int) -> None:
    placement = striped(2, 6, NAMES[:3])
    workers = make_workers(MODEL)
    start_all(workers, placement)
    wrong: list[str] = []

    def route(router: int) -> None:
        exchange = exchange_over(workers, placement)
        for step in range(20):
            exchange.begin_step(step)
            given = batch(MODEL, 1 + step % 7, seed=100 * router + step)
            for layer in range(2):
                y_TD = run(exchange, given, layer).double()
                if not torch.allclose(
                    y_TD, MODEL.reference(layer, given.x_TD, given.ids_TK, given.weights_TK), atol=1e-5
                ):
                    wrong.append(f"router {router}, step {step}, layer {layer}")

    with ThreadPoolExecutor(n_routers) as threads:
        list(threads.map(route, range(n_routers)))
    assert wrong == []


def test_a_row_is_sent_once_to_a_worker_and_counted_per_expert(make_workers: MakeWorkers) -> None:
    placement = striped(2, 6, ("a",))
    workers = make_workers(MODEL)
    start_all(workers, placement)
    exchange = exchange_over(workers, placement)
    given = batch(MODEL, 7, k=3)
    run(exchange, given)
    assert exchange.counters.sent_bytes == given.x_TD.nbytes + 7 * 3 * 8
    assert exchange.counters.rows_LE[1].tolist() == torch.bincount(given.ids_TK.flatten(), minlength=6).tolist()
    assert exchange.counters.rows_LE[0].sum() == 0
