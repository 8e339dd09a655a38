"""The live page's stream and files.

Catches: a controller asked once per page, or while nobody looks; a change that does not lead from one document to
the next; a page that stays blank while the controller is away; a verb without the admin key; files that ask others.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.errors import RequestError
from cluster.gateway.latency import Waits
from cluster.gateway.page import assets, feed
from cluster.gateway.page.feed import Feed
from cluster.placement.edit import replicate
from tests.loop import in_loop, until
from tests.unit.cluster.gateway.fake_gateway import serve
from tests.unit.cluster.gateway.page.fake_source import FakeSource

STATIC = Path(assets.__file__).parent / "static"


def parse(data: bytes) -> tuple[str, dict[str, Any]]:
    kind, content = data.decode().strip().split("\n")
    return kind.removeprefix("event: "), json.loads(content.removeprefix("data: "))


def apply(document: dict[str, Any], change: dict[str, Any]) -> None:
    """As store.js does."""
    change = copy.deepcopy(change)
    rows, events, point = change.pop("rows", {}), change.pop("new_events", []), change.pop("point", None)
    document |= change
    for layer, row in rows.items():
        document["load"][int(layer)] = row
    document["events"] = [*document["events"], *events][-200:]
    document["history"] = [*document["history"], *([] if point is None else [point])][-240:]


async def take(events: AsyncGenerator[bytes, None]) -> tuple[str, dict[str, Any]]:
    async with asyncio.timeout(20):
        return parse(await anext(events))


@in_loop
async def test_one_loop_asks_for_all_pages_and_none_when_nobody_looks() -> None:
    source = FakeSource((3, 4, 2))
    stream = Feed(source, {"model": "tiny"}, interval_s=0.02)
    await asyncio.sleep(0.1)
    assert source.observed == 0
    async with aclosing(stream.follow()) as one, aclosing(stream.follow()) as two:
        assert [(await take(one))[0], (await take(two))[0]] == ["snapshot", "snapshot"]
        before, changes = source.observed, 0
        while changes < 5:
            changes += (await take(one))[0] == "change"
        assert source.observed - before <= changes + 1, "two pages, one question for each change"
    rested = source.observed
    await asyncio.sleep(0.1)
    assert source.observed <= rested + 1
    async with aclosing(stream.follow()) as again:
        kind, document = await take(again)
        assert kind == "snapshot" and len(document["history"]) == 1, "what is old is not shown as new"


@in_loop
async def test_changes_lead_from_one_document_to_the_next() -> None:
    source = FakeSource((3, 4, 2))
    stream = Feed(source, {"model": "tiny"}, interval_s=0.01)
    async with aclosing(stream.follow()) as events:
        _, document = await take(events)
        assert document["model"] == "tiny" and document["source"]["state"] == "live"
        assert document["imbalance"] == source.membership.load.imbalance  # type: ignore[union-attr]
        source.events.add("chaos", "kill -9 expert-1")
        source.place(replicate(source.membership.epochs.placement, 0, 1, "expert-0"))
        while document["epoch"] == 1 or document["events"][-1]["text"] != "kill -9 expert-1":
            apply(document, (await take(events))[1])
        for _ in range(3):
            change = (await take(events))[1]
            assert "placement" not in change and "load" not in change and "events" not in change, "only what is new"
            apply(document, change)
        assert document["placement"]["replicas"][0][1] == [0, 1]
        async with aclosing(stream.follow()) as fresh:
            _, whole = await take(fresh)
        while document["at"] < whole["at"]:
            apply(document, (await take(events))[1])
        assert document == whole


@in_loop
async def test_a_controller_that_is_away_is_said_and_its_return_too(monkeypatch: pytest.MonkeyPatch) -> None:
    source = FakeSource((3, 4, 2))
    source.away = True
    stream = Feed(source, {"model": "tiny"}, interval_s=0.01)
    async with aclosing(stream.follow()) as events:
        _, document = await take(events)
        assert document["source"]["state"] == "away" and document["model"] == "tiny"
        source.away = False
        while document["source"]["state"] != "live":
            apply(document, (await take(events))[1])
        assert document["load"] is not None
        source.away = True
        while document["source"]["state"] != "away":
            apply(document, (await take(events))[1])
        assert document["load"] is not None, "what was known stays"
        source.away = False
        monkeypatch.setattr(feed, "_MAX_BEHIND", 3)
        await until(lambda: next(iter(stream._readers)).behind)
        while (await take(events))[0] != "snapshot":  # one that reads slowly gets the whole document
            pass
        monkeypatch.setattr(feed, "_MAX_READERS", 1)
        with pytest.raises(RequestError, match="1 pages look"):
            await anext(stream.follow())


def test_quantiles_of_the_last_seconds() -> None:
    now = [0.0]
    waits = Waits(lambda: now[0])
    assert waits.quantiles() is None
    for i in range(1, 101):
        waits.add(i / 100)
    assert waits.quantiles() == (0.5, 0.95)
    now[0] = 9.0
    waits.add(3.0)
    now[0] = 11.0
    assert waits.quantiles() == (3.0, 3.0)


@pytest.fixture(scope="module")
def keyed(byte_level_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, FakeSource]]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("secret\n")
    source = FakeSource((3, 4, 2))
    with serve(byte_level_path, source=source, api_keys_file=keys) as served:
        yield served.url, source


def test_files_are_open_and_what_they_show_is_not(keyed: tuple[str, FakeSource]) -> None:
    url, source = keyed
    index = httpx.get(url)
    assert index.status_code == 200 and index.headers["content-type"].startswith("text/html")
    policy = index.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for name in assets.names():
        answer = httpx.get(f"{url}/page/{name}")
        assert answer.status_code == 200 and answer.headers["content-security-policy"] == policy
        tag = {"If-None-Match": answer.headers["etag"]}
        assert httpx.get(f"{url}/page/{name}", headers=tag).status_code == 304
    for name in ("no.js", "..%2Fassets.py"):
        assert httpx.get(f"{url}/page/{name}", headers={"Authorization": "Bearer secret"}).status_code == 404
    assert httpx.get(f"{url}/live").status_code == 401 and source.observed == 0
    with httpx.stream("GET", f"{url}/live", headers={"Authorization": "Bearer secret"}) as live:
        assert live.headers["content-type"].startswith("text/event-stream")
        assert next(live.iter_lines()) == "event: snapshot"


def test_verbs_need_both_keys_and_the_admin_api_decides(keyed: tuple[str, FakeSource]) -> None:
    url, source = keyed

    def operate(verb: str, body: Any = None, **headers: str) -> httpx.Response:
        return httpx.post(f"{url}/live/operate/{verb}", json=body or {}, headers=headers)

    both = {"Authorization": "Bearer secret", "X-Admin-Key": "admin"}
    assert operate("rebalance", **{"X-Admin-Key": "admin"}).status_code == 401
    assert operate("rebalance", Authorization="Bearer secret").status_code == 401
    for verb in ("receipts", "placement", "scale", "chaos", "workers/../drain", "workers/a/b/drain"):
        assert operate(verb, **both).status_code in (404, 405), verb
    assert source.operated == []
    assert operate("rebalance", {"dry_run": True}, **(both | {"X-Admin-Key": "wrong"})).status_code == 401
    assert operate("workers/expert-1/drain", **both).json()["epoch_after"] == 2
    assert operate("workers/expert-9/drain", **both).status_code == 409
    assert source.operated[1] == ("/workers/expert-1/drain", {}, "admin")


def test_files_know_each_other_and_nobody_else() -> None:
    """What the browser would find out late: a module that is not there, an inline script, another site's address."""
    texts = {path.name: path.read_text() for path in STATIC.iterdir()}
    index = texts["index.html"]
    assert set(re.findall(r'(?:src|href)="page/([^"]+)"', index)) == {"app.js", "icon.svg", "page.css"}
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=", index)
    imported = {name for text in texts.values() for name in re.findall(r'from "\./([^"]+)"', text)}
    assert imported <= texts.keys() and imported | {"app.js", "icon.svg", "page.css", "index.html"} == texts.keys()
    for name, text in texts.items():
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert "innerHTML" not in text and "eval(" not in text, name
        assert len(text.splitlines()) <= 250 and "—" not in text, name
    known = set(re.findall(r'\bid="([^"]+)"', index))
    wanted = {name for text in texts.values() for name in re.findall(r'find\("([^"]+)"\)', text)}
    assert wanted <= known, "an element that the page does not have"


def test_without_a_controller_there_is_no_page(byte_level_path: Path) -> None:
    for options in ({"source": None}, {"source": FakeSource((3, 4, 2)), "live_page": False}):
        with serve(byte_level_path, **options) as served:  # type: ignore[arg-type]
            assert httpx.get(served.url).status_code == 404
