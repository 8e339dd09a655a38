"""The live page in a real browser, on the gateway's own routes; only the controller is made up.

Catches: a blank page, a number that is not the controller's, a policy that is broken, a page that needs a mouse, a wide
screen or a light one, an answer coloured by the wrong expert, verbs without the admin key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.gateway.page import feed
from cluster.placement.edit import replicate
from tests.browser import Faults, chromium
from tests.unit.cluster.gateway.fake_gateway import Served, serve
from tests.unit.cluster.gateway.page.fake_source import FakeSource
from tests.unit.cluster.gateway.scripted import say

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def opened(browser: Browser, byte_level_path: Path) -> Open:
    """A page on a gateway: `with opened(source, width=..., ...) as (page, served)`."""

    @contextmanager
    def opening(
        source: FakeSource, width: int = 1280, scheme: str = "light", **options: Any
    ) -> Iterator[tuple[Page, Served]]:
        with serve(byte_level_path, source=source, max_context=2000, **options) as served:
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
            page.set_default_timeout(60_000)
            faults = Faults(page, served.url)
            page.goto(served.url)
            try:
                yield page, served
                assert faults.seen == []
            finally:
                page.close()

    return opening


def awaits(page: Page, selector: str, pattern: str) -> str:
    """The text of an element, once it matches."""
    tests = "([selector, pattern]) => new RegExp(pattern).test(document.querySelector(selector)?.textContent ?? '')"
    try:
        page.wait_for_function(tests, arg=[selector, pattern])
    except Exception as error:
        shown = page.text_content(selector) if page.locator(selector).count() else None
        raise AssertionError(f"{selector} does not say {pattern!r} but {shown!r}") from error
    return page.text_content(selector) or ""


def colour(page: Page, selector: str, name: str = "background-color") -> str:
    return str(page.eval_on_selector(selector, "(e, name) => getComputedStyle(e).getPropertyValue(name)", name))


def test_what_the_controller_says_is_shown(opened: Open) -> None:
    source = FakeSource((32, 8, 4))
    with opened(source) as (page, _):
        awaits(page, "#state", "live")
        source.traffic = True
        awaits(page, "#balance", r"imbalance \d")
        source.observed = 0
        page.wait_for_function("() => document.querySelectorAll('#hottest tbody tr').length === 8")
        shown = float(re.findall(r"imbalance ([0-9.]+)", page.text_content("#balance") or "")[0])
        known = {round(point["imbalance"], 2) for point in page_history(page)}
        assert shown in known and 1 < shown < 4, "the controller's number, not one of the page's own"
        assert page.locator("#workers li").count() == 4 and "expert-3" in (page.text_content("#workers") or "")
        assert awaits(page, "#others", "router-0").count("running") == 1
        source.events.add("chaos", "kill -9 <b>expert-2</b>", level="warning")
        source.states["expert-2"] = "lost"
        source.events.see(source.membership.view.members)
        awaits(page, "#events li", "kill -9 <b>expert-2</b>")
        awaits(page, "#state", "degraded")
        assert "Lost: expert-2" in awaits(page, "#notice", "Lost")
        source.place(replicate(source.membership.epochs.placement, 3, 5, "expert-3"))
        awaits(page, "#foot", "epoch 2")
        page.click("text=Every layer as a table")
        page.wait_for_function("() => document.querySelectorAll('#by-layer tbody tr').length === 32")
        assert page.locator("#by-layer tbody tr").nth(3).locator("td").last.text_content() == "9"


def page_history(page: Page) -> list[dict[str, Any]]:
    """What the gateway tells a page that looks now."""
    text = page.evaluate(
        """async () => {
          const reader = (await fetch('live')).body.getReader();
          let text = '';
          while (!text.includes('\\n\\n')) text += new TextDecoder().decode((await reader.read()).value);
          await reader.cancel();
          return JSON.parse(text.split('data: ')[1].split('\\n\\n')[0]).history;
        }"""
    )
    return list(text)


def test_it_says_in_words_what_is_missing(opened: Open) -> None:
    source = FakeSource((3, 8, 2), traffic=False)
    source.away = True
    with opened(source) as (page, served):
        awaits(page, "#state", "controller away")
        assert "requests are served" in awaits(page, "#notice", "not answered since")
        source.away = False
        awaits(page, "#heat-empty", "No expert has got a row yet")
        awaits(page, "#numbers figure:nth-child(2)", "no requests yet")
        assert not page.locator("#hottest").is_visible()
        source.traffic = True
        awaits(page, "#hottest tbody", r"\d:\d")
        assert not page.locator("#heat-empty").is_visible()
        page.route("**/live", lambda route: route.abort())  # what a gateway that ended looks like to the browser
        source.observed = 0
        page.reload()
        awaits(page, "#notice", "gateway does not answer")
        page.unroute("**/live")
        awaits(page, "#state", "live")
        say(served, "Paris.")
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=500, body="gone"))
        page.fill("#prompt", "Hello")
        page.press("#prompt", "Enter")
        awaits(page, "#talk", "the gateway answered 500")
        assert page.input_value("#prompt") == "Hello", "a question that was not answered is not lost"


def test_a_model_without_experts(opened: Open) -> None:
    source = FakeSource((2, 0, 1), traffic=False)
    with opened(source) as (page, _):
        awaits(page, "#heat-empty", "This model has no experts")


def test_it_asks_for_the_key_and_keeps_it_in_the_tab(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    source = FakeSource((3, 8, 2))
    with opened(source, api_keys_file=tmp_path / "keys") as (page, served):
        awaits(page, "#ask-key-why", "asks for an API key")
        page.fill("#ask-key-value", "wrong")
        page.keyboard.press("Enter")
        awaits(page, "#ask-key-why", "Incorrect API key")
        page.keyboard.press("Escape")
        awaits(page, "#state", "key needed")
        assert source.observed == 0, "without the key nothing is looked at"
        page.click("#key")
        page.fill("#ask-key-value", "secret")
        page.keyboard.press("Enter")
        awaits(page, "#state", "live")
        page.reload()
        awaits(page, "#state", "live")
        say(served, "Paris.")
        page.fill("#prompt", "Where?")
        page.press("#prompt", "Enter")
        awaits(page, ".answer", "Paris")
        kept = page.evaluate("() => [JSON.stringify({ ...localStorage }), document.cookie]")
        assert "secret" not in "".join(kept)


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (1280, "dark")])
def test_narrow_and_dark(opened: Open, width: int, scheme: str) -> None:
    with opened(FakeSource((58, 256, 32)), width, scheme) as (page, _):
        awaits(page, "#hottest tbody", r"\d:\d")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        wide = "() => [...document.querySelectorAll('#workers li')].some((card) => card.scrollWidth > card.clientWidth)"
        assert page.locator("#workers li").count() == 32 and not page.evaluate(wide), "a card's figures stay in it"
        dark = luminance(colour(page, "body")) < 60
        assert dark is (scheme == "dark")
        assert abs(luminance(colour(page, "body", "color")) - luminance(colour(page, "body"))) > 150
        page.click("#theme")
        awaits(page, "#theme", "light")
        page.click("#theme")
        awaits(page, "#theme", "dark")
        assert luminance(colour(page, "body")) < 60
        page.reload()
        awaits(page, "#theme", "dark")
        awaits(page, "#hottest tbody", r"\d:\d")
        cells = page.evaluate("() => document.querySelector('.heat-scroll').scrollWidth")
        assert cells > 1000 or width > 1000, "cells keep a size that can be seen, and scroll"


def luminance(css: str) -> float:
    red, green, blue = map(float, re.findall(r"[0-9.]+", css)[:3])
    return 0.3 * red + 0.6 * green + 0.1 * blue


def test_by_keyboard_alone(opened: Open) -> None:
    source = FakeSource((32, 8, 4))
    with opened(source) as (page, _):
        awaits(page, "#hottest tbody", r"\d:\d")
        page.keyboard.press("Tab")
        assert page.evaluate("() => document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowRight")
        assert page.evaluate("() => document.activeElement.value") == "worker"
        page.keyboard.press("Tab")
        assert page.evaluate("() => document.activeElement.id") == "heat"
        for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowDown"):
            page.keyboard.press(key)
        assert awaits(page, "#cell", "layer 2, expert 3").endswith("on expert-1")
        page.keyboard.press("End")
        awaits(page, "#cell", "layer 31, expert 3")
        reached = set()
        for _ in range(30):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("() => document.activeElement.id"))
        assert {"layer", "colour", "new-chat", "prompt", "send", "events"} <= reached
        outlined = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
        assert outlined != "none" or page.evaluate("() => document.activeElement === document.body")


def test_an_answer_is_coloured_by_the_experts_of_the_chosen_layer(opened: Open) -> None:
    """In the fake model token i goes to the experts i and i + 1 of 8, in layers 0 and 2; layer 1 has none."""
    with opened(FakeSource((3, 8, 2))) as (page, served):
        awaits(page, "#hottest tbody", r"\d:\d")
        say(served, "naïve 🙂 Paris")
        page.fill("#prompt", "Say it")
        page.press("#prompt", "Enter")
        assert awaits(page, ".answer", "Paris$") == "naïve 🙂 Paris", "characters of several tokens are whole"
        awaits(page, ".answer + small", "token")
        page.fill("#layer", "0")
        tokens = page.locator(".answer span")
        n = tokens.count()
        assert tokens.evaluate_all("all => all.map((e) => e.dataset.expert)") == [str(i % 8) for i in range(n)]
        first, second = (tokens.nth(i).evaluate("e => getComputedStyle(e).backgroundColor") for i in (0, 1))
        assert first != second and "0)" not in first
        assert awaits(page, "#chat-legend", "expert 0")
        page.fill("#layer", "1")
        assert tokens.evaluate_all("all => all.map((e) => e.dataset.expert)") == [""] * n
        tokens.nth(2).hover()
        awaits(page, "#token", "token 3 .* this layer has no experts in layer 1")
        page.uncheck("#colour")
        page.fill("#layer", "2")
        assert re.search(r"[/,] 0\)$", tokens.nth(0).evaluate("e => getComputedStyle(e).backgroundColor"))
        served.session.pause_s = 2.0
        page.fill("#prompt", "Again")
        page.press("#prompt", "Enter")
        awaits(page, "#send", "Stop")
        page.click("#send")
        awaits(page, "#talk > :last-child", "stopped")
        assert [turn.text_content() for turn in page.locator(".asked").all()] == ["Say it", "Again"]


def test_verbs_ask_for_the_admin_key_and_show_what_came_of_them(opened: Open) -> None:
    source = FakeSource((3, 8, 2))
    with opened(source) as (page, _):
        awaits(page, "#hottest tbody", r"\d:\d")
        assert not page.locator("#rebalance").is_visible() and page.locator("text=Drain").count() == 0
        for key, shown in (("wrong", "The key was refused"), ("admin", "epoch 2 after 0.50 s")):
            page.click("#operate")
            page.fill("#ask-key-value", key)
            page.keyboard.press("Enter")
            page.click("#workers li:nth-child(2) >> text=Drain")
            awaits(page, "#ask-key-title", r"Drain expert-1\?")
            page.click("dialog .primary")
            awaits(page, "#notice", shown)
        page.click("#rebalance")
        awaits(page, "#ask-key-why", "imbalance 1.62 to 1.01, 9 replicas")
        page.click("dialog .primary")
        page.focus("#heat")
        page.keyboard.press("Enter")
        page.click("#cell-verbs >> text=Replicate")
        awaits(page, "#notice", "placement/replicate: epoch 2")
        page.click("#operate")
        assert not page.locator("#rebalance").is_visible()
    verbs = [(path, body) for path, body, key in source.operated if key == "admin"]
    assert verbs[0] == ("/workers/expert-1/drain", {})
    assert [body for path, body in verbs if path == "/rebalance"] == [{"dry_run": True}, {}]
    assert ("/placement/replicate", {"layer": 0, "expert": 0, "worker": "expert-1"}) in verbs


def test_a_large_model_twenty_times_a_second(
    opened: Open, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """58 x 256. What it measures is reported, not asserted: frames depend on the machine."""
    monkeypatch.setattr(feed, "INTERVAL_S", 0.05)
    with opened(FakeSource((58, 256, 32))) as (page, _):
        awaits(page, "#hottest tbody", r"\d:\d")
        frames = page.evaluate(
            """() => new Promise((resolve) => {
              const times = [], begun = performance.now();
              let changes = 0, last = document.querySelector('#numbers').textContent;
              const frame = (now) => {
                times.push(now);
                const text = document.querySelector('#numbers').textContent;
                changes += text !== last;
                last = text;
                if (now - begun < 2000) requestAnimationFrame(frame);
                else {
                  const gaps = times.slice(1).map((at, i) => at - times[i]).sort((a, b) => a - b);
                  resolve({ rate: gaps.length / ((times.at(-1) - times[0]) / 1000), changes,
                    median: gaps[Math.floor(gaps.length / 2)], p95: gaps[Math.floor(gaps.length * 0.95)] });
                }
              };
              requestAnimationFrame(frame);
            })"""
        )
        for name, value in frames.items():
            record_property(f"frames_{name}", round(value, 1))
        print(frames)
        assert frames["changes"] > 5, "what comes in is drawn"
