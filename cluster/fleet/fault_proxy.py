"""A router's connections to its expert workers, led through itself so that they can be cut: for `expertmesh chaos`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress

from workers.transport.threads import LoopThread

_log = logging.getLogger(__name__)

_BYTES = 1 << 16


class FaultProxy:
    """TCP on loopback, one port for each worker, passed on to wherever the worker listens.

    A worker from which the router is partitioned is as behind a firewall that drops what comes: connections stay and
    are taken, no byte passes, and what was on its way arrives once the partition is over.
    """

    def __init__(self) -> None:
        self._loop = LoopThread("fault-proxy")
        self._doors: dict[str, _Door] = {}

    def through(self, addresses: Mapping[str, str]) -> dict[str, str]:
        """By worker, the address here that leads to the given one. From any thread but the proxy's."""
        return self._loop.run(self._through(dict(addresses)))

    def partition(self, worker: str, seconds: float) -> None:
        """Let nothing through to or from `worker` for so long; 0: for good."""
        self._loop.run(self._partition(worker, seconds))

    def close(self) -> None:
        """Take no connections any more."""
        self._loop.close()

    async def _through(self, addresses: dict[str, str]) -> dict[str, str]:
        for worker, address in addresses.items():
            door = self._doors.get(worker)
            if door is None or door.target != address:
                is_open = asyncio.Event() if door is None else door.is_open
                if door is None:
                    is_open.set()
                else:
                    door.close()
                self._doors[worker] = door = _Door(address, is_open)
                await door.listen()
        return {worker: self._doors[worker].address for worker in addresses}

    async def _partition(self, worker: str, seconds: float) -> None:
        if (door := self._doors.get(worker)) is None:
            raise KeyError(worker)
        _log.warning("cut off from %s%s", worker, f" for {seconds:g} s" if seconds else "")
        door.is_open.clear()
        if seconds:
            asyncio.get_running_loop().call_later(seconds, door.is_open.set)


class _Door:
    """The port that leads to one worker."""

    def __init__(self, target: str, is_open: asyncio.Event) -> None:
        self.target = target
        self.is_open = is_open
        self.address = ""
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        """Take connections."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        """Take no further ones; those that there are end with the worker that they lead to."""
        if self._server is not None:
            self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        try:
            await self.is_open.wait()
            there = await asyncio.open_connection(host.strip("[]"), int(port))
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(self._pass_on(reader, there[1]), self._pass_on(there[0], writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_BYTES):
                await self.is_open.wait()
                writer.write(data)
                await writer.drain()
        await self.is_open.wait()
        writer.transport.abort()
