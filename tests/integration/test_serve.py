"""`expertmesh serve` as a user meets it. Catches a cluster that listens to strangers, does not come back after a
kill -9, leaves processes behind, or fails without saying why."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.observe.series.table import TABLE
from tests.browser import Faults, chromium
from tests.cluster_fixture import (
    LOOPBACK,
    RunningCluster,
    alive,
    chat,
    listeners,
    private_environ,
    run,
    starting_cluster,
    stream,
    text,
    wait_until,
)
from tests.promtool import check_metrics
from tests.terminal import run_in_terminal

pytestmark = pytest.mark.cluster


def test_answers_and_says_who_does_what(cluster: RunningCluster) -> None:
    assert httpx.get(f"{cluster.url}/ready").status_code == 200
    first = chat(cluster, "hello", max_tokens=8)
    assert chat(cluster, "hello", max_tokens=8) == first
    status = cluster.status()
    roles = sorted(process["role"] for process in status["processes"])
    assert roles == ["controller", "expert", "expert", "gateway", "router", "router"]
    for process in status["processes"]:
        assert process["state"] == "ready"
        assert psutil.pid_exists(process["pid"])
        assert process["node"]
        assert process["address"] or process["role"] == "controller"
    assert cluster.command("status").returncode == 0


def test_every_process_shows_its_series_and_is_discovered(cluster: RunningCluster) -> None:
    """Would catch: a process without an endpoint, a series that nobody sets, a scrape of the whole that lacks one."""
    chat(cluster, "hello", max_tokens=4)
    processes = cluster.status()["processes"]
    found = set()
    for process in processes:
        assert httpx.get(process["metrics_url"].replace("/metrics", "/ready")).status_code == 200
        text = httpx.get(process["metrics_url"]).text
        assert check_metrics(text) == "", process["id"]
        found |= {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    # Those of a GPU, of a change of the placement, of autoscaling, of a refusal, of a restart.
    unset = {"expertmesh_requests_rejected_total", "expertmesh_member_restarts_total"}
    missing = {
        s.name
        for s in TABLE
        if not any(word in s.name for word in ("_gpu_", "_action", "moved", "_gain_", "_autoscale_"))
    }
    assert missing - found - unset == {"expertmesh_process_scraped"}
    whole = httpx.get(f"{cluster.url}/metrics").text
    assert check_metrics(whole) == ""
    for process in processes:
        assert f'expertmesh_process_resident_bytes{{process="{process["id"]}"}}' in whole
    tokens = re.findall(r"^expertmesh_expert_tokens_total{.*} ([0-9.]+)$", whole, re.MULTILINE)
    assert tokens and sum(map(float, tokens)) > 0
    by_http = httpx.get(f"{cluster.url}/metrics/targets").json()
    assert sorted(group["labels"]["instance"] for group in by_http) == sorted(process["id"] for process in processes)
    by_file = json.loads(Path(cluster.status()["run_dir"], "prometheus_targets.json").read_text())
    assert by_file == by_http


def test_the_page_and_the_terminal_show_the_cluster(cluster: RunningCluster) -> None:
    """An answer coloured by the experts of its tokens; one imbalance on the page, in `status` and by the admin API."""
    body = {"model": cluster.model, "prompt": "once", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    body["return_routing"] = True
    answers = [httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=120) for _ in range(2)]
    routing, again = (answer.json()["choices"][0]["routing"] for answer in answers)
    assert routing == again and routing["start"] == 0 and len(routing["experts"]) == 11
    assert all(len(set(chosen)) == 2 for layers in routing["experts"] for chosen in layers)

    def imbalances() -> list[float]:
        told = re.search(r"imbalance ([0-9.]+)", page.text_content("#balance") or "")
        asked = json.loads(cluster.command("placement", "show", "--json").stdout)["imbalance"]
        return [float(told[1]) if told else -1, cluster.process_of("controller")["detail"].get("imbalance", 0), asked]

    def until_stopped(route: Any) -> None:
        """The page's question, to a model of random weights that could end its answer after any token."""
        route.continue_(post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True}))

    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        faults = Faults(page, cluster.url)
        page.goto(cluster.url)
        page.wait_for_selector("#workers li:nth-child(2)")
        page.route("**/v1/chat/completions", until_stopped)
        page.fill("#prompt", "Once upon a time")
        page.press("#prompt", "Enter")
        page.wait_for_function(
            "() => document.querySelectorAll('.answer [data-expert]:not([data-expert=\"\"])').length > 5"
        )
        page.click("#send")
        page.wait_for_selector("#hottest tbody tr")
        # Once nothing is sent any more every load is forgotten alike, so that the imbalance stays.
        wait_until(lambda: max(imbalances()) - min(imbalances()) < 0.011, 60)
        assert imbalances()[2] >= 1 and "router-1" in (page.text_content("#others") or "")
        assert "expert-1 is ready" in (page.text_content("#events") or "")
        assert faults.seen == []
    expertmesh = str(Path(sys.executable).with_name("expertmesh"))
    shown = run_in_terminal(expertmesh, "status", "--watch", environ=cluster.environ, until="expert-1 is ready")
    assert shown.rindex("\x1b[?1049l") > shown.rindex("expert-1") and "imbalance" in shown and "Traceback" not in shown


def test_nothing_listens_beyond_loopback(cluster: RunningCluster) -> None:
    found = listeners(cluster.family())
    assert ("127.0.0.1", cluster.port) in found
    assert not {address for address in found if address[0] not in LOOPBACK}


@pytest.mark.parametrize("member", ["expert-1", "router-0", "controller", "gateway-0"])
def test_a_killed_process_comes_back(cluster: RunningCluster, member: str) -> None:
    before = chat(cluster, "hello", max_tokens=8)
    cluster.kill(member)
    wait_until(lambda: httpx.get(f"{cluster.url}/ready").status_code == 200)
    assert chat(cluster, "hello", max_tokens=8) == before


def test_a_killed_haproxy_is_replaced_before_clients_give_up(cluster: RunningCluster) -> None:
    """Left alone, Serve needs half a minute; and the new HAProxy says 404 until it hears of the gateway."""
    victims = [process for process in cluster.family() if process.name() == "haproxy"]
    assert victims
    for process in victims:
        process.kill()
    seen: set[int] = set()

    def answers() -> bool:
        with suppress(httpx.TransportError):
            seen.add(httpx.get(f"{cluster.url}/ready").status_code)
        return 200 in seen

    psutil.wait_procs(victims, timeout=5)
    wait_until(answers, 15)
    assert seen <= {200, 503}


@pytest.mark.parametrize("member", ["expert-0", "router-0", "controller"])
def test_no_stream_notices_a_kill(cluster: RunningCluster, member: str) -> None:
    undisturbed: list[str] = []
    stream(cluster, 1500, undisturbed)
    disturbed: list[str] = []
    reader = threading.Thread(target=stream, args=(cluster, 1500, disturbed))
    reader.start()
    wait_until(lambda: len(disturbed) > 20 or not reader.is_alive(), 60)
    cluster.kill(member)
    reader.join(120)

    assert text(disturbed) == text(undisturbed)
    assert disturbed[-1] == "data: [DONE]"


def test_a_taken_port_is_named(cluster: RunningCluster, tiny_checkpoint: Path) -> None:
    result = cluster.command("serve", str(tiny_checkpoint), "--port", str(cluster.port))
    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{cluster.port}: Address already in use" in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_while_it_starts(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with starting_cluster(tmp_path, tiny_checkpoint, "--kv-cache-mb", "16") as starting:
        wait_until(lambda: "Ray at" in starting.log.read_text(), 60)
        family = starting.family()
        starting.process.send_signal(signal.SIGINT)
        assert starting.process.wait(60) == 0
        assert starting.log.read_text().rstrip().endswith("stopped")
        assert not alive(family)


def test_defects_are_said_before_anything_starts(tmp_path: Path, tiny_checkpoint: Path) -> None:
    environ = private_environ(tmp_path / "run")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_checkpoint.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    hot = tmp_path / "hot"
    shutil.copytree(tiny_checkpoint, hot)
    (hot / "generation_config.json").write_text('{"temperature": "hot"}')
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        cases = {
            ("serve", str(broken)): "model.safetensors",
            ("serve", str(hot)): f"{hot / 'generation_config.json'}: 'temperature' must be a number",
            ("serve", str(tmp_path / "nowhere")): "no such directory",
            ("serve", str(tiny_checkpoint), "--port", port): f"cannot listen on 127.0.0.1:{port}",
            ("serve", str(tiny_checkpoint), "--kv-cache-mb", "100000000"): "not enough memory",
            ("serve", str(tiny_checkpoint), "--host", "0.0.0.0"): "no API keys",
        }
        for arguments, says in cases.items():
            result = run(*arguments, environ=environ)
            assert result.returncode == 1, arguments
            assert says in result.stderr, result.stderr
            assert "Traceback" not in result.stderr
            assert len(result.stderr.strip().splitlines()) == 1
    assert not any((tmp_path / "run").rglob("*.json"))


def test_stop_finishes_what_is_open_and_leaves_nothing_behind(cluster: RunningCluster) -> None:
    """Last of all, for it ends the cluster of the others."""
    family = cluster.family()
    events: list[str] = []
    reader = threading.Thread(target=stream, args=(cluster, 1500, events))
    reader.start()
    wait_until(lambda: bool(events) or not reader.is_alive(), 60)
    result = cluster.command("stop")
    assert result.returncode == 0, result.stderr
    reader.join(30)
    assert events[-1] == "data: [DONE]", "an open request was cut off"
    assert cluster.process.wait(30) == 0
    assert not alive(family)
    assert cluster.command("status").returncode == 1
