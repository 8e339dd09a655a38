"""What a cluster holds on to. Would catch blocks, streams, sockets, threads or memory that requests leave behind."""

from __future__ import annotations

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.cluster_fixture import RunningCluster, alive
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

MIB = 2**20


def members(cluster: RunningCluster, *roles: str) -> dict[str, psutil.Process]:
    return {p["id"]: psutil.Process(p["pid"]) for p in cluster.status()["processes"] if p["role"] in roles}


def request(cluster: RunningCluster, client: httpx.Client, number: int, keep: bool) -> None:
    """One streamed completion, read to its end or left at a random point."""
    rng = random.Random(number)
    body = {
        "model": cluster.model, "prompt": "word " * rng.randint(1, 60), "max_tokens": rng.randint(1, 40),
        "seed": number, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    with client.stream("POST", f"{cluster.url}/v1/completions", json=body) as response:
        assert response.status_code == 200
        events = 0
        stop_after = rng.randint(0, body["max_tokens"])
        for line in response.iter_lines():
            events += line.startswith("data: ")
            if not keep and events >= stop_after:
                return
        assert keep is False or events > 0


def run_requests(cluster: RunningCluster, n: int, keep: float, first: int = 0) -> None:
    limits = httpx.Limits(max_connections=16, max_keepalive_connections=0)
    with httpx.Client(timeout=60, limits=limits) as client, ThreadPoolExecutor(16) as pool:
        kept = [random.Random(i).random() < keep for i in range(n)]
        for done in [pool.submit(request, cluster, client, first + i, kept[i]) for i in range(n)]:
            done.result()


def idle(cluster: RunningCluster) -> bool:
    """Nobody is served, and every KV block is free."""
    details = [p["detail"] for p in cluster.look()["processes"] if p["role"] in ("router", "gateway")]
    return all(
        d.get("running", 0) == d.get("waiting", 0) == d.get("open", 0) == 0
        and d.get("free_blocks") == d.get("total_blocks")
        for d in details
    )


def test_requests_leave_nothing_behind(cluster: RunningCluster) -> None:
    run_requests(cluster, 100, keep=0.5)
    wait_until(lambda: idle(cluster))
    processes = members(cluster, "gateway", "router", "expert")
    before = {name: (p.num_fds(), p.num_threads()) for name, p in processes.items()}
    run_requests(cluster, 500, keep=0.5, first=1000)
    wait_until(lambda: idle(cluster))

    def settled() -> bool:
        # Thread pools may still grow by a thread, sockets of clients that left close a moment later.
        return all(
            p.num_fds() <= before[name][0] + 2 and p.num_threads() <= before[name][1] + 2
            for name, p in processes.items()
        )

    wait_until(settled)


def test_a_client_that_leaves_while_workers_hang_gives_its_blocks_back(cluster: RunningCluster) -> None:
    """Not when the workers are back, or given up, which takes longer than this test waits. All of them hang: what one
    held alone would be loaded by another."""
    run_requests(cluster, 1, keep=1.0)
    wait_until(lambda: idle(cluster))
    workers = members(cluster, "expert").values()
    for worker in workers:
        worker.suspend()
    try:
        body = json.dumps({"model": cluster.model, "prompt": "word " * 60, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{cluster.port}\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", cluster.port)) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: not idle(cluster))
        wait_until(lambda: idle(cluster), 30)
    finally:
        for worker in workers:
            worker.resume()
    run_requests(cluster, 1, keep=1.0)


def test_memory_does_not_grow(cluster: RunningCluster) -> None:
    run_requests(cluster, 500, keep=0.9)
    processes = members(cluster, "gateway", "router", "expert")
    before = {name: p.memory_info().rss for name, p in processes.items()}
    run_requests(cluster, 2000, keep=0.9, first=5000)
    growth = {name: (p.memory_info().rss - before[name]) / MIB for name, p in processes.items()}
    assert max(growth.values()) < 16, growth


def is_agent(process: psutil.Process) -> bool:
    """Ray's two agents take a minute to notice that a killed Ray is gone."""
    return any("Agent" in word for word in process.cmdline())


def test_kill_9_of_serve_ends_everything(cluster: RunningCluster) -> None:
    """After which nobody can tidy up. Last of all, for it ends the cluster of the others."""
    family = [process for process in cluster.family() if not is_agent(process)]
    cluster.process.kill()
    cluster.process.wait(30)
    wait_until(lambda: not alive(family))
    assert cluster.command("status").returncode == 1
