"""A cluster whose rows travel collectively. Catches other tokens than in one process, a stream that notices a lost or a
hanging process, a group that leaves somebody out, and a listener that strangers reach."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.config import Config
from cluster.router.build import build_engine
from cluster.router.params import SamplingParams
from tests.cluster_fixture import (
    LOOPBACK,
    RunningCluster,
    chat,
    listeners,
    private_environ,
    run,
    running_cluster,
    stream,
    text,
    wait_until,
)
from tests.integration.test_parity import VOCABULARY, write_tokenizer
from tests.reference import random_tokens, save_shape

pytestmark = pytest.mark.cluster

STEPS = 48
TOKENS = 600  # a stream is then still open when something happens to it
OPTIONS = ("--transport", "collective", "--kv-cache-mb", "32")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[RunningCluster]:
    """Two routers and three expert workers."""
    directory = tmp_path_factory.mktemp("collective")
    with running_cluster(directory, tiny_checkpoint, *OPTIONS, "--routers", "2", "--expert-workers", "3") as running:
        yield running


def complete(cluster: RunningCluster, prompt: Sequence[int]) -> list[int]:
    """The token ids of a greedy continuation."""
    body = {
        "model": cluster.model, "prompt": list(prompt), "max_tokens": STEPS, "temperature": 0, "ignore_eos": True,
        "logprobs": 0,
    }  # fmt: skip
    response = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return [int(word.strip()[1:]) for word in response.json()["choices"][0]["logprobs"]["tokens"]]


def in_one_process(checkpoint: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same continuations, all in one batch of an engine that holds its experts itself."""
    engine = build_engine(Config(kv_cache_mb=16), checkpoint)
    params = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.submit(str(index), prompt, params)
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.has_work():
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
    return tokens


def test_same_tokens_as_in_one_process(tmp_path: Path) -> None:
    """Over gRPC a whole cluster of this shape says what transformers says: test_parity."""
    model = tmp_path / "model"
    save_shape(model, "mixtral", "sixteen_experts_top_4", seed=11, vocab_size=VOCABULARY)
    write_tokenizer(model)
    prompts = [random_tokens(VOCABULARY, 3 + 7 * i, seed=i) for i in range(12)]
    options = ("--transport", "collective", "--routers", "2", "--expert-workers", "3", "--kv-cache-mb", "16")
    with running_cluster(tmp_path, model, *options) as running, ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda prompt: complete(running, prompt), prompts)) == in_one_process(model, prompts)


def group_of(cluster: RunningCluster) -> dict[str, Any]:
    group = cluster.look()["group"]
    return {} if group is None else dict(group)


def is_whole(cluster: RunningCluster) -> bool:
    """Whether everybody is in one group, with the process it is now."""
    status = cluster.look()
    ranks = {process["id"]: process for process in status["processes"] if process["role"] in ("router", "expert")}
    group = status["group"]
    if group is None:
        return False
    meant = dict(zip(group["routers"] + group["workers"], group["pids"], strict=True))
    return meant == {name: process["pid"] for name, process in ranks.items()} and all(
        process["group"] == group["number"] for process in ranks.values()
    )


def test_status_says_what_was_chosen_and_who_takes_part(cluster: RunningCluster) -> None:
    status = cluster.status()
    assert (status["transport"], status["transport_reason"]) == ("collective", "as configured")
    assert "transport: collective (as configured)" in cluster.log.read_text()
    assert "over collective (as configured)" in cluster.command("status").stdout
    wait_until(lambda: is_whole(cluster))
    assert chat(cluster, "hello", max_tokens=8)


def test_nothing_listens_beyond_loopback(cluster: RunningCluster) -> None:
    assert not {address for address in listeners(cluster.family()) if address[0] not in LOOPBACK}


@pytest.fixture(scope="module")
def undisturbed(cluster: RunningCluster) -> str:
    """What a stream says that nothing happens to."""
    events: list[str] = []
    stream(cluster, TOKENS, events)
    return text(events)


@contextmanager
def under_streams(cluster: RunningCluster, undisturbed: str) -> Iterator[None]:
    """What happens within happens to four streams, and none of them differs from one that nothing happens to."""
    disturbed: list[list[str]] = [[] for _ in range(4)]
    readers = [threading.Thread(target=stream, args=(cluster, TOKENS, events)) for events in disturbed]
    for reader in readers:
        reader.start()
    wait_until(lambda: all(len(events) > 20 for events in disturbed) or not readers[0].is_alive(), 60)
    yield
    for reader in readers:
        reader.join(120)
    for events in disturbed:
        assert text(events) == undisturbed
        assert events[-1] == "data: [DONE]"


@pytest.mark.parametrize("member", ["expert-1", "router-0", "router-1"])
def test_no_stream_notices_a_kill(cluster: RunningCluster, undisturbed: str, member: str) -> None:
    before = group_of(cluster)["number"]
    with under_streams(cluster, undisturbed):
        cluster.kill(member)
    wait_until(lambda: is_whole(cluster))
    assert group_of(cluster)["number"] > before


def test_the_group_outlives_the_controller(cluster: RunningCluster, undisturbed: str) -> None:
    wait_until(lambda: is_whole(cluster))
    before = group_of(cluster)
    with under_streams(cluster, undisturbed):
        cluster.kill("controller")
    assert group_of(cluster) == before


@pytest.mark.parametrize("member", ["router-1", "expert-0"])
def test_a_process_that_hangs_holds_nobody_up_for_ever(cluster: RunningCluster, undisturbed: str, member: str) -> None:
    """Without the router that hangs the others go on; without the worker they wait for it."""
    pid = cluster.process_of(member)["pid"]
    with under_streams(cluster, undisturbed):
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_until(lambda: cluster.members(member.partition("-")[0])[member]["state"] == "lost")
            if member.startswith("router"):
                wait_until(lambda: member not in group_of(cluster).get("routers", [member]))
                assert chat(cluster, "hello", max_tokens=8)
        finally:
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: is_whole(cluster), 60)


def test_it_is_refused_where_others_reach_it(tmp_path: Path, tiny_checkpoint: Path) -> None:
    environ = private_environ(tmp_path / "run")
    beyond = [("--ray-address", "192.0.2.1:6379", "--trusted-network")]
    addresses = [entry for entries in psutil.net_if_addrs().values() for entry in entries]
    outside = [entry.address for entry in addresses if entry.family == socket.AF_INET]
    beyond += [("--collective-interface", address) for address in outside if not address.startswith("127.")]
    for options in beyond:
        result = run("serve", str(tiny_checkpoint), *OPTIONS, *options, environ=environ)
        assert result.returncode == 1
        assert "neither authenticates nor encrypts" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
