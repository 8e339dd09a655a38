"""Chromium, as Debian has it, driven by playwright. A user's machine may lack either: tests then skip."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser."""
    if os.environ.get("CI") != "true":
        pytest.importorskip("playwright", reason="playwright drives the browser: pip install -e '.[dev]'")
        if CHROMIUM is None:
            pytest.skip("no Chromium: apt install chromium")
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None
    with sync_playwright() as playwright:
        # Nothing else than the tests' own page is shown, and containers allow no sandbox of its own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


class Faults:
    """What a page must not do: errors, broken policies, requests to anybody but `url`."""

    def __init__(self, page: Page, url: str) -> None:
        self.seen: list[str] = []
        page.on("pageerror", lambda error: self.seen.append(f"error: {error}"))
        page.on("console", self._console)
        page.on("request", lambda request: self._request(request, url))

    def _console(self, message: Any) -> None:
        # A refused or broken request is part of what is tested; the browser tells of it in its own words.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.seen.append(f"{message.type}: {message.text}")

    def _request(self, request: Any, url: str) -> None:
        if not request.url.startswith(url):
            self.seen.append(f"a request to {request.url}")
