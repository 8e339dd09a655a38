"""`bench chaos` against a scripted gateway and victims of its own. Catches a changed, failed or unfinished stream that
is not reported, a pause that is not the client's, and an interrupted run that looks like a complete one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from cluster.bench import chaos as chaos_module
from cluster.bench import disturbed
from cluster.bench.chaos import Report, chaos
from cluster.bench.chaos_stream import Stream, compare, pauses
from cluster.bench.disturbed import Comparison

TOKENS = 20


def stream(tokens: str, margins: float = 1.0, finish: str | None = "length") -> Stream:
    return Stream(list(tokens), [margins] * len(tokens), [float(i) for i in range(len(tokens) + 1)], finish)


def test_only_a_near_tie_excuses_a_difference() -> None:
    wanted = stream("abcd")
    assert compare(stream("abcd"), wanted) == "same"
    assert compare(stream("abcd", finish="stop"), wanted) == "changed"
    assert compare(stream("abxd"), wanted) == "changed"
    assert compare(stream("abc"), wanted) == compare(stream("abcde"), wanted) == "changed"
    wanted.margins[2] = 1e-5
    assert compare(stream("abxy"), wanted) == "near-tie"
    assert compare(stream("ab"), wanted) == "changed"


def test_a_pause_is_the_longest_gap_around_the_kill() -> None:
    first = Stream(arrivals=[0.0, 1.0, 2.0, 7.0, 8.0])
    second = Stream(arrivals=[0.0, 3.0, 4.0])
    assert pauses([first, second], [2.5, 7.5, 100.0]) == [5.0, 1.0, 0.0]


def test_a_report_counts_each_stream_once() -> None:
    report = Report("expert", 3, Comparison([stream("ab"), stream("cd")]), kills=[0.5])
    report.comparison.streams = [stream("ab"), stream("cx"), stream("ab"), stream("c", finish=None)]
    result = report.result()
    assert (result["streams"], result["changed"], result["near_ties"], result["kills"]) == (3, 1, 0, 1)
    assert result["differences"] == [
        {"stream": 1, "position": 1, "wanted": ["d"], "seen": ["x"], "margin": [1.0], "finish": ["length", "length"]}
    ]
    assert Report("expert", 3).result()["pause_s"] is None


class Victims:
    """A fleet of one process that is started again when it was killed."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[bytes]] = []

    def processes(self, port: int | None) -> list[dict[str, Any]]:
        if not self.started or self.started[-1].poll() is not None:
            self.started.append(subprocess.Popen(["sleep", "60"]))
        return [{"role": "expert", "id": "expert-0", "state": "ready", "pid": self.started[-1].pid}]


class Scripted(BaseHTTPRequestHandler):
    """Streams `TOKENS` tokens; from request `wrong` on another one in the middle, from request `broken` on none."""

    asked = 0
    wrong = broken = sys.maxsize

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "m"}]}).encode())

    def do_POST(self) -> None:
        asked, type(self).asked = type(self).asked, type(self).asked + 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        for position in range(TOKENS):
            token = "x" if asked >= self.wrong and position == TOKENS // 2 else str(position)
            logprobs = {"tokens": [token], "top_logprobs": [{token: -0.1, "other": -2.0}]}
            choice = {"logprobs": logprobs, "finish_reason": "length" if position == TOKENS - 1 else None}
            event = {"error": {"code": "internal_error", "message": "lost"}} if asked >= self.broken else None
            self.wfile.write(b"data: " + json.dumps(event or {"choices": [choice]}).encode() + b"\n\n")
            time.sleep(0.005)
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def victims(monkeypatch: pytest.MonkeyPatch) -> Iterator[Victims]:
    victims = Victims()
    monkeypatch.setattr(disturbed, "processes", victims.processes)
    monkeypatch.setattr(chaos_module, "_QUIET_S", (0.05, 0.1))
    yield victims
    for process in victims.started:
        process.kill()
        process.wait()


def run_chaos(*options: str, wrong: int = sys.maxsize, broken: int = sys.maxsize) -> Result:
    handler = type("Handler", (Scripted,), {"asked": 0, "wrong": wrong, "broken": broken})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        app = typer.Typer()
        app.command()(chaos)
        url = f"http://127.0.0.1:{server.server_port}"
        result = CliRunner().invoke(app, ["--url", url, "--streams", "4", *options])
        server.shutdown()
    return result


def test_a_run_that_nobody_noticed(victims: Victims) -> None:
    run = run_chaos("--kills", "3", "--json")
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    assert (result["kills"], result["changed"], result["errors"], result["interrupted"]) == (3, 0, [], None)
    assert result["streams"] >= 4 and 0 < result["pause_s"]["median"] <= result["pause_s"]["max"]
    assert sum(process.poll() == -signal.SIGKILL for process in victims.started) == 3


def test_the_last_line_has_the_figures_and_what_went_wrong_fails_the_run(victims: Victims) -> None:
    changed = run_chaos("--kills", "2", wrong=5)
    assert changed.exit_code == 1
    assert "differs at token 10: ['x'] instead of ['10']" in changed.stdout
    last = changed.stdout.splitlines()[-1]
    assert last.startswith("2 of 2 x kill -9 of one expert under 4 streams: ") and "maximum" in last
    assert "; 0 of " not in last
    failed = run_chaos("--kills", "2", "--json", broken=4)
    assert failed.exit_code == 1
    result = json.loads(failed.stdout)
    assert (len(result["errors"]), result["streams"]) == (4, 0)
    assert "every stream of a round failed: error in the stream: lost" in result["interrupted"]


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_an_interrupted_run_says_so(victims: Victims, number: int, name: str) -> None:
    def interrupt() -> None:
        while len(victims.started) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    run = run_chaos("--kills", "1000")
    assert run.exit_code == 1, run.output
    last = run.stdout.splitlines()[-1]
    assert last.startswith(f"interrupted ({name}) after ") and " of 1000 x kill -9" in last
