"""What only a collective group can suffer: killed, frozen and idle processes, and many groups one after another."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import torch
from torch import Tensor

from cluster.placement.placement import Placement, striped
from cluster.router.exchange.exchange import Exchange
from tests.contract.collective_harness import CollectiveWorkers
from tests.contract.collective_processes import Processes
from tests.contract.harness import LocalWorkers, start_all
from tests.contract.model import Batch, Model, batch
from tests.contract.test_results import run
from workers.transport.collective.group import host_store

MODEL = Model()
NAMES = ("a", "b", "c")
PLACEMENT = striped(2, 6, NAMES)
KILLS = int(os.environ.get("COLLECTIVE_KILLS", "12"))


@pytest.fixture
def make_processes() -> Iterator[Callable[..., Processes]]:
    made: list[Processes] = []

    def make(n_routers: int = 1, deadline_s: float = 2.0) -> Processes:
        made.append(Processes(MODEL, NAMES, n_routers, deadline_s))
        return made[-1]

    yield make
    for processes in made:
        processes.close()


def exchanges_over(processes: Processes, placement: Placement = PLACEMENT) -> list[Exchange]:
    for transport in processes.transports.values():
        exchange = Exchange(placement, processes.addresses, transport, reply_timeout_s=20, rejoin_timeout_s=60)
        processes.exchanges.append((exchange, placement))
    return [exchange for exchange, _ in processes.exchanges]


def undisturbed(given: list[Batch]) -> list[Tensor]:
    """The sums of a cluster within this process, which nothing can kill."""
    workers = LocalWorkers(MODEL)
    start_all(workers, PLACEMENT)
    exchange = Exchange(PLACEMENT, workers.addresses, workers.transport(), reply_timeout_s=20, rejoin_timeout_s=20)
    return [run(exchange, each) for each in given]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("n_routers", [1, 2])
def test_workers_killed_at_any_moment_change_no_bit(make_processes: Callable[..., Processes], n_routers: int) -> None:
    """Without a replica anywhere: every loss must be noticed, and the step wait for the next group and go on."""
    processes = make_processes(n_routers)
    given = [batch(MODEL, 1 + 9 * seed, seed=seed) for seed in range(4)]
    expected = undisturbed(given)
    steps = [0] * n_routers
    wrong: list[str] = []
    stop = threading.Event()

    def route(router: int, exchange: Exchange) -> None:
        while not stop.is_set():
            exchange.begin_step(steps[router])
            case = steps[router] % len(given)
            try:
                if not torch.equal(run(exchange, given[case]), expected[case]):
                    wrong.append(f"router {router}, step {steps[router]}")
            except Exception as error:
                wrong.append(f"router {router}, step {steps[router]}: {error}")
                return
            steps[router] += 1

    routers = enumerate(exchanges_over(processes))
    threads = [threading.Thread(target=route, args=router) for router in routers]
    for thread in threads:
        thread.start()
    draw = random.Random(n_routers)
    away = []
    for _ in range(KILLS):
        before = list(steps)
        wait_for(lambda before=before: wrong or all(now > then + 2 for now, then in zip(steps, before, strict=True)))
        time.sleep(draw.random() * 0.01)
        processes.signal(draw.choice(NAMES), signal.SIGKILL)
        killed_at, before = time.monotonic(), list(steps)
        wait_for(lambda before=before: wrong or all(now > then + 1 for now, then in zip(steps, before, strict=True)))
        away.append(time.monotonic() - killed_at)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert processes.number > KILLS
    away.sort()
    times = f"median {away[len(away) // 2]:.3f} s, most {away[-1]:.3f} s"
    print(f"\n{KILLS} kills, {sum(steps)} steps; to the second step after a kill: {times}")


def test_a_frozen_worker_is_noticed_while_nothing_is_asked_of_it(make_processes: Callable[..., Processes]) -> None:
    processes = make_processes(deadline_s=0.5)
    (transport,), (exchange,) = processes.transports.values(), exchanges_over(processes)
    wait_for(lambda: transport.ready)
    before = run(exchange, batch(MODEL, 9))
    number = transport.ready
    processes.signal("b", signal.SIGSTOP)
    wait_for(lambda: transport.broken >= number)
    processes.signal("b", signal.SIGKILL)
    assert torch.equal(run(exchange, batch(MODEL, 9)), before)


def test_a_frozen_worker_is_noticed_in_the_middle_of_a_step(make_processes: Callable[..., Processes]) -> None:
    processes = make_processes(deadline_s=0.5)
    (transport,), (exchange,) = processes.transports.values(), exchanges_over(processes)
    wait_for(lambda: transport.ready)
    before = run(exchange, batch(MODEL, 9))
    processes.signal("b", signal.SIGSTOP)
    threading.Timer(1.5, processes.signal, ("b", signal.SIGKILL)).start()
    assert torch.equal(run(exchange, batch(MODEL, 9)), before)


def test_a_router_that_leaves_or_joins_disturbs_nobody() -> None:
    """A planned change builds the next group beside the one in use: no reply is lost, nothing counts as broken."""
    workers = CollectiveWorkers(MODEL)
    start_all(workers, PLACEMENT)
    exchange = Exchange(PLACEMENT, workers.addresses, workers.transport(), reply_timeout_s=20, rejoin_timeout_s=20)
    given = batch(MODEL, 9)
    before = run(exchange, given)
    handle = exchange.dispatch(1, given.x_TD, given.ids_TK, given.weights_TK)
    for _ in range(3):
        workers.transport()
    assert torch.equal(exchange.combine(handle), before)
    assert torch.equal(run(exchange, batch(MODEL, 9)), before)
    assert exchange.counters.repairs == 0
    assert all(transport.broken == 0 for transport in workers.routers)
    workers.close()


def test_fifty_groups_leave_nothing_behind() -> None:
    """Threads, descriptors and memory: gloo keeps all three for a group that is not taken down properly."""
    workers = CollectiveWorkers(MODEL)
    start_all(workers, PLACEMENT)
    exchange = Exchange(PLACEMENT, workers.addresses, workers.transport(), reply_timeout_s=20, rejoin_timeout_s=20)
    process = psutil.Process()

    def change(times: int) -> tuple[int, int, int]:
        for _ in range(times):
            workers.regroup()
            run(exchange, batch(MODEL, 9))
        number = workers.number
        wait_for(lambda: all(server.numbers()["streams"] == 1 for server in workers.servers) and number)
        time.sleep(0.5)
        gc.collect()
        return process.num_threads(), process.num_fds(), process.memory_info().rss

    threads, fds, rss = change(10)
    threads_after, fds_after, rss_after = change(50)
    print(f"\nthreads {threads} -> {threads_after}, descriptors {fds} -> {fds_after}, bytes {rss} -> {rss_after}")
    workers.close()
    assert threads_after <= threads + 2
    assert fds_after <= fds + 2
    assert rss_after < rss + 20e6


def test_an_idle_group_sleeps_and_wakes(make_processes: Callable[..., Processes]) -> None:
    """Reports what an idle worker costs, and how long the first step after a rest takes."""
    processes = make_processes()
    (transport,), (exchange,) = processes.transports.values(), exchanges_over(processes)
    wait_for(lambda: transport.ready)
    given = batch(MODEL, 1)
    before = run(exchange, given)
    worker = psutil.Process(processes.pid("a"))
    used = sum(worker.cpu_times()[:2])
    time.sleep(2)
    used = sum(worker.cpu_times()[:2]) - used
    began = time.perf_counter()
    assert torch.equal(run(exchange, given), before)
    print(f"\nidle worker: {used / 2:.2%} of a core; first step after it: {1e3 * (time.perf_counter() - began):.1f} ms")
    assert used < 0.2, "a worker without requests must sleep"


def test_a_store_listens_on_the_interface_it_was_given_alone() -> None:
    store, address = host_store("127.0.0.1")
    port = int(address.rsplit(":", 1)[1])
    listening = {
        c.laddr.ip for c in psutil.Process().net_connections() if c.laddr.port == port and c.status == "LISTEN"
    }
    assert listening == {"127.0.0.1"}
    assert store.num_keys() >= 0
    with pytest.raises(OSError):
        host_store("203.0.113.1")
