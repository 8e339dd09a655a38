"""The expert worker's part in the handshake: captured steps through device memory, other rows another way."""

from __future__ import annotations

import json
from collections.abc import Callable

from workers.errors import DeviceError
from workers.transport.base import Accepted, Acceptor, Declined
from workers.transport.device.server import DeviceServer, Joining


class DeviceAcceptor:
    """Takes what a `DeviceWay` offers: both or nothing."""

    name = "device"

    def __init__(self, server: DeviceServer, other: Acceptor) -> None:
        self._server, self._other = server, other

    def accept(self, offer: str, router: str, end: Callable[[str], None]) -> AcceptedBoth:
        """Raises Declined, saying why."""
        try:
            said = json.loads(offer)
            steps, other = str(said["steps"]), str(said["other"])
        except (ValueError, KeyError, TypeError):
            raise Declined("an offer that cannot be read") from None
        try:
            joining = self._server.accept(steps, router)
        except DeviceError as error:
            raise Declined(str(error)) from None
        try:
            return AcceptedBoth(joining, self._other.accept(other, router, end))
        except Declined:
            joining.close()
            raise


class AcceptedBoth:
    """A router that steps through device memory, and whose other rows come another way."""

    def __init__(self, steps: Joining, other: Accepted) -> None:
        self.text = json.dumps({"steps": steps.text, "other": other.text})
        self._steps, self._other = steps, other

    def start(self) -> None:
        """The router was told."""
        self._other.start()
        self._steps.start()

    def close(self) -> None:
        """Its stream ended."""
        self._steps.close()
        self._other.close()
