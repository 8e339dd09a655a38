"""Catches an operator who gets a traceback, or a request that means something else than what was typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from cluster.cli import app

DEEP = "[" * 100_000


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("secret")
    monkeypatch.setenv("EXPERTMESH_ADMIN_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("EXPERTMESH_ADMIN_TOKEN_FILE", str(tmp_path / "token"))


def say(*arguments: str) -> str:
    """What `expertmesh ARGUMENTS` says when it fails."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.exception
    return result.stderr


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "is not what `expertmesh placement plan --json` prints"),
        (DEEP, "is not what `expertmesh placement plan --json` prints"),
        ("[]", "is not what `expertmesh placement plan --json` prints"),
        ('{"homes": [[{"expert-0": NaN}]]}', "cannot be asked: Out of range float values"),
    ],
    ids=["half", "deep", "list", "NaN"],
)
def test_a_file_that_is_no_plan(content: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "plan").write_text(content)
    assert why in say("placement", "apply", str(tmp_path / "plan"))


@pytest.mark.parametrize("worker", ["expert-0/node", "expert-0/undrain?", "../placement", "", "a b"])
def test_a_worker_s_name_is_no_path(worker: str) -> None:
    """Would catch `drain expert-0/node`, which would drain all workers of a node."""
    assert "there is no expert worker" in say("drain", worker)


@pytest.mark.parametrize("url", ["http://[", "ftp://127.0.0.1", "nowhere"])
def test_an_address_that_is_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTMESH_ADMIN_URL", url)
    assert say("rebalance").startswith("error: ")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (httpx.Response(200, text="<html>"), "is no admin API: it answered 200"),
        (httpx.Response(301, headers={"Location": "/"}), "is no admin API: it answered 301"),
        (httpx.Response(500, json=[]), "the controller answered 500: []"),
        (httpx.Response(422, json={"detail": "homes.0.0: no"}), "the controller answered 422: homes.0.0: no"),
        (httpx.Response(409, json={"detail": "expert-0 is drained"}), "error: expert-0 is drained"),
        (httpx.ReadError("reset"), "was lost: reset; it comes back by itself"),
        (httpx.ConnectError("refused"), "does not answer: refused"),
    ],
    ids=["page", "moved", "broken", "invalid", "refused", "lost", "away"],
)
def test_whatever_answers(answer: httpx.Response | Exception, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def request(method: str, url: str, **_: Any) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        answer.request = httpx.Request(method, url)
        return answer

    monkeypatch.setattr(httpx, "request", request)
    assert why in say("rebalance")


def test_ctrl_c_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def request(*_: Any, **__: Any) -> httpx.Response:
        raise KeyboardInterrupt

    monkeypatch.setattr(httpx, "request", request)
    result = CliRunner().invoke(app, ["rebalance"])
    assert result.exit_code == 130 and "it goes on in the cluster" in result.stderr
