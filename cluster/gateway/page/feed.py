"""The live page's stream: however many look, the controller is asked by one loop, and by none while nobody does."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.errors import RequestError
from cluster.gateway.page.board import Board
from cluster.gateway.sse import dump

log = logging.getLogger(__name__)

INTERVAL_S = 0.5
_ANSWER_S = 3.0  # for the controller to answer a look
_SILENCE_S = 15.0  # after which a comment keeps proxies from closing the stream
_MAX_READERS = 200
_MAX_BEHIND = 16  # changes that wait for a reader; one that is further behind gets the whole document


class Source(Protocol):
    """The controller, as the page needs it."""

    async def observe(self, known_epoch: int, known_event: int) -> dict[str, Any]:
        """See `cluster.control.observation.observe`. Whatever it raises means that the controller is away."""
        ...

    async def operate(self, path: str, body: Any, key: str) -> tuple[int, Any]:
        """POST to the admin API, which checks the key: HTTP status and answer."""
        ...


@dataclass(eq=False, slots=True)
class _Reader:
    """One page that looks."""

    changes: deque[bytes] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    behind: bool = False


class Feed:
    """One gateway's stream of the cluster's state. Belongs to the running asyncio loop."""

    def __init__(self, source: Source, facts: Mapping[str, Any], interval_s: float | None = None) -> None:
        """`facts`: what the document says beside what the controller knows."""
        self._source = source
        self._facts = facts
        self._interval_s = interval_s or INTERVAL_S
        self._board = Board(facts)
        self._readers: set[_Reader] = set()
        self._looked = asyncio.Event()  # once, whatever came of it
        self._loop: asyncio.Task[None] | None = None
        self._away_since: float | None = None

    async def follow(self) -> AsyncGenerator[bytes, None]:
        """The events of one reader: a `snapshot`, then a `change` for each look. RequestError when too many read."""
        if len(self._readers) >= _MAX_READERS:
            raise RequestError(
                f"{_MAX_READERS} pages look at this gateway already",
                code="too_many_readers",
                status=503,
                retry_after_s=30,
            )
        reader = _Reader(behind=True)
        self._readers.add(reader)
        if self._loop is None:
            self._loop = asyncio.create_task(self._run())
        try:
            await self._looked.wait()
            while True:
                if reader.behind:
                    reader.behind = False
                    reader.changes.clear()
                    yield _event("snapshot", self._board.snapshot())
                while reader.changes:
                    yield reader.changes.popleft()
                reader.news.clear()
                try:
                    async with asyncio.timeout(_SILENCE_S):
                        await reader.news.wait()
                except TimeoutError:
                    yield b": still here\n\n"
        finally:
            self._readers.discard(reader)
            if not self._readers:
                self._rest()

    def _rest(self) -> None:
        """Nobody looks: what is known grows old, so the next reader begins anew."""
        if self._loop is not None:
            self._loop.cancel()
        self._loop, self._away_since = None, None
        self._looked = asyncio.Event()
        self._board = Board(self._facts)

    async def _run(self) -> None:
        while True:
            began = time.monotonic()
            change = await self._look()
            self._looked.set()
            if change:
                self._tell(_event("change", change))
            await asyncio.sleep(max(0.0, began + self._interval_s - time.monotonic()))

    async def _look(self) -> dict[str, Any]:
        board = self._board
        try:
            async with asyncio.timeout(_ANSWER_S):
                seen = await self._source.observe(board.epoch, board.last_event)
            self._away_since = None
            return board.update(seen, time.monotonic())
        except Exception as error:  # of Ray, of the network: the page says that the controller is away
            if self._away_since is None:
                self._away_since = time.time()
                log.info("the live page's controller is away: %s", error)
            with suppress(Exception):
                return board.away(self._away_since)
            return {}

    def _tell(self, data: bytes) -> None:
        for reader in self._readers:
            if len(reader.changes) >= _MAX_BEHIND:
                reader.behind = True
                reader.changes.clear()
            elif not reader.behind:
                reader.changes.append(data)
            reader.news.set()


def _event(name: str, document: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {dump(document)}\n\n".encode("ascii")
