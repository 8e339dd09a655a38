"""Would catch: sequences that outlive their client, open doors, wrong readiness, broken framing, missing metrics."""

from __future__ import annotations

import json
import logging
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.gateway.metrics import Metrics
from cluster.observe.discovery import Target
from cluster.observe.endpoint import Endpoint
from tests.unit.cluster.gateway.fake_gateway import Served, serve
from tests.waiting import wait_until

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


def wait_until_idle(served: Served) -> None:
    wait_until(lambda: served.session.open == 0)


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_whose_client_leaves_ends_its_sequences(served: Served, n: int) -> None:
    served.session.pause_s = 0.02
    body = CHAT | {"stream": True, "n": n, "ignore_eos": True}
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert served.session.open == n
    wait_until_idle(served)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_ends_its_sequence(served: Served, stream: bool) -> None:
    served.session.pause_s = 60
    body = json.dumps(CHAT | {"stream": stream}).encode()
    address = served.url.removeprefix("http://")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: len(served.session.asked) == 1)
    wait_until_idle(served)


def test_a_body_that_never_ends_leaves_nothing_behind(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert served.session.asked == []


def test_a_stop_string_cancels_the_sequence(served: Served) -> None:
    served.session.say(*served.tokenizer.encode("on and on. "))
    body = {"model": "tiny", "prompt": "x", "max_tokens": 100, "stop": ".", "stream": True}
    text = httpx.post(f"{served.url}/v1/completions", json=body).text
    assert served.session.open == 0
    assert "." not in "".join(json.loads(e[6:])["choices"][0]["text"] for e in text.split("\n\n")[:-2])


def test_events_are_framed_as_clients_read_them(served: Served) -> None:
    # Python's splitlines, which some clients use, takes U+0085 and U+2028 for line ends too.
    served.session.say(*served.tokenizer.encode('a\n\r"\\\u0085\u2028🙂'), 2)
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=CHAT | {"stream": True}) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        lines = response.read().decode().splitlines()
    assert lines[1::2] == [""] * (len(lines) // 2)
    assert lines[-2] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2:2]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == 'a\n\r"\\\u0085\u2028🙂'


def test_alive_is_not_ready(served: Served) -> None:
    assert httpx.get(f"{served.url}/ready").status_code == 200
    served.session.is_ready = False
    response = httpx.get(f"{served.url}/ready")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_version_is_the_packages(served: Served) -> None:
    assert httpx.get(f"{served.url}/version").json() == {"version": served.app.version}


def test_tokenize_and_detokenize_are_inverse(served: Served) -> None:
    answer = httpx.post(f"{served.url}/tokenize", json={"prompt": "naïve 🙂", "return_token_strs": True}).json()
    assert answer["tokens"] == served.tokenizer.encode("naïve 🙂")
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 256)
    assert len(answer["token_strs"]) == answer["count"]
    back = httpx.post(f"{served.url}/detokenize", json={"model": "tiny", "tokens": answer["tokens"]})
    assert back.json() == {"prompt": "naïve 🙂"}
    assert httpx.post(f"{served.url}/detokenize", json={"tokens": [340]}).json()["error"]["param"] == "tokens"


def test_tokenize_messages_is_what_chat_sends(served: Served) -> None:
    answer = httpx.post(f"{served.url}/tokenize", json={"messages": CHAT["messages"]}).json()
    httpx.post(f"{served.url}/v1/chat/completions", json=CHAT | {"max_tokens": 1})
    assert served.session.asked[0][0] == answer["tokens"]
    both = httpx.post(f"{served.url}/tokenize", json={"prompt": "x", "messages": CHAT["messages"]})
    assert (both.status_code, both.json()["error"]["code"]) == (400, "invalid_value")
    assert httpx.post(f"{served.url}/tokenize", json={}).json()["error"]["code"] == "missing_required_parameter"


def samples(served: Served) -> dict[str, float]:
    response = httpx.get(f"{served.url}/metrics")
    families = text_string_to_metric_families(response.text)
    return {
        s.name + "".join(f" {s.labels[k]}" for k in ("route", "status", "reason") if k in s.labels): s.value
        for family in families
        for s in family.samples
        if "le" not in s.labels
    }


def test_metrics_count_requests_tokens_and_times(served: Served) -> None:
    before = samples(served)
    body = CHAT | {"max_tokens": 5, "ignore_eos": True}
    httpx.post(f"{served.url}/v1/chat/completions", json=body)
    httpx.post(f"{served.url}/v1/chat/completions", json=body | {"n": 0})
    httpx.get(f"{served.url}/nowhere/{time.monotonic()}")
    after = samples(served)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["expertmesh_http_requests_total /v1/chat/completions 200"] == 1
    assert grown["expertmesh_http_requests_total /v1/chat/completions 400"] == 1
    assert grown["expertmesh_http_requests_total other 404"] == 1
    assert grown["expertmesh_requests_rejected_total invalid_value"] == 1
    assert grown["expertmesh_requests_rejected_total unknown_url"] == 1
    assert grown["expertmesh_requests_finished_total length"] == 1
    n_prompt = len(served.session.asked[0][0])
    assert grown["expertmesh_generation_tokens_total"] == grown["expertmesh_request_generation_tokens_sum"] == 5
    assert grown["expertmesh_prompt_tokens_total"] == grown["expertmesh_request_prompt_tokens_sum"] == n_prompt
    assert grown["expertmesh_time_to_first_token_seconds_count"] == 1
    assert grown["expertmesh_inter_token_latency_seconds_count"] == 4
    assert grown["expertmesh_request_time_per_output_token_seconds_count"] == 1
    whole = grown["expertmesh_request_seconds_sum"]
    parts = ("time_to_first_token_seconds_sum", "inter_token_latency_seconds_sum")
    assert whole == pytest.approx(sum(grown[f"expertmesh_{part}"] for part in parts))
    assert grown["expertmesh_request_time_per_output_token_seconds_sum"] == pytest.approx(
        grown["expertmesh_inter_token_latency_seconds_sum"] / 4
    )
    assert after["expertmesh_requests_open"] == 0


def test_keys_close_everything_that_shows_or_costs_something(byte_level_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("good-key\n")
    with serve(byte_level_path, api_keys_file=file) as served:
        for path in ("/health", "/ready", "/version", "/metrics", "/openapi.json"):
            assert httpx.get(served.url + path).status_code == 200
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize"),
                             ("POST", "/detokenize"), ("GET", "/v1/nothing"), ("GET", "//health")):  # fmt: skip
            for headers in ({}, {"authorization": "Bearer bad-key"}):
                response = httpx.request(method, served.url + path, headers=headers, json=CHAT)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        headers = {"authorization": "Bearer good-key"}
        assert httpx.get(f"{served.url}/v1/models", headers=headers).status_code == 200
        assert "HTTPBearer" in str(httpx.get(f"{served.url}/openapi.json").json()["components"]["securitySchemes"])


def test_a_long_prompt_does_not_hold_up_other_requests(served: Served) -> None:
    response = httpx.post(f"{served.url}/tokenize", json={"prompt": "word " * 15_000})
    assert response.json()["count"] == len(served.tokenizer.encode("word " * 15_000))


def test_a_scrape_of_a_gateway_is_of_all_processes(byte_level_path: Path) -> None:
    """Behind one port a scrape meets any gateway: counters must not jump between those of one and of another."""
    mine, other = Metrics("gateway-0"), Metrics("gateway-1")
    shown = Endpoint(other.collector, "127.0.0.1")
    with serve(byte_level_path, metrics=mine) as one, serve(byte_level_path, metrics=other) as two:
        mine.cluster = "here:8000"
        mine.targets = (
            Target("gateway-0", "gateway", "http://127.0.0.1:9/metrics"),  # itself: not asked over the network
            Target("gateway-1", "gateway", shown.url),
            Target("expert-0", "expert", "http://127.0.0.1:9/metrics"),
        )
        for _ in range(3):
            httpx.get(f"{two.url}/health")
        httpx.get(f"{one.url}/health")
        text = httpx.get(f"{one.url}/metrics").text
        targets = httpx.get(f"{one.url}/metrics/targets").json()
    shown.close()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    scraped = {sample.labels["process"]: sample.value for sample in families["expertmesh_process_scraped"].samples}
    assert scraped == {"gateway-0": 1, "gateway-1": 1, "expert-0": 0}
    health = {
        sample.labels["gateway"]: sample.value
        for sample in families["expertmesh_http_requests"].samples
        if sample.name.endswith("_total") and sample.labels["route"] == "/health"
    }
    assert health == {"gateway-0": 1, "gateway-1": 3}
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)), "a family in two places is no exposition"
    assert targets[0] == {
        "targets": ["127.0.0.1:9"],
        "labels": {
            "__metrics_path__": "/metrics", "cluster": "here:8000", "role": "expert", "instance": "expert-0",
        },
    }  # fmt: skip
    assert [group["labels"]["instance"] for group in targets] == ["expert-0", "gateway-0", "gateway-1"]


def test_a_head_leaves_its_connection_in_order(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with httpx.Client(base_url=served.url) as client, caplog.at_level(logging.ERROR):
        whole = client.get("/v1/models")
        head = client.head("/v1/models/")
        assert head.status_code == 200 and head.content == b""
        assert head.headers["content-length"] == whole.headers["content-length"]
        assert client.get("/v1/models").json() == whole.json()
    assert not caplog.records
