"""Responses that can be read again and gone on with. In memory, bounded: the oldest leave first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import Any

from cluster.errors import RequestError
from cluster.gateway.tenants import tenant

MAX_RESPONSES = 4096
MAX_CHARACTERS = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Stored:
    """`response` as it was sent; `messages` of the conversation up to and with it."""

    response: dict[str, Any]
    messages: list[dict[str, Any]]

    @property
    def characters(self) -> int:
        """About how much memory it holds."""
        return sum(len(str(message)) for message in self.messages) + 1000


class ResponseStore:
    """Of one gateway: another gateway does not know its responses, nor does this one after a restart.

    A response belongs to the tenant that asked for it; for others it is not there. Thread-safe, as large answers are
    written beside the event loop.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._stored: OrderedDict[tuple[str, str], tuple[Stored, int]] = OrderedDict()
        self._characters = 0

    def put(self, stored: Stored) -> None:
        size = stored.characters
        with self._lock:
            self._stored[_key(stored.response["id"])] = (stored, size)
            self._characters += size
            while len(self._stored) > MAX_RESPONSES or self._characters > MAX_CHARACTERS:
                _, (_, oldest) = self._stored.popitem(last=False)
                self._characters -= oldest

    def get(self, response_id: str, param: str | None = None) -> Stored:
        """Raise RequestError (404) for one that is not there, or not any more."""
        with self._lock:
            found = self._stored.get(_key(response_id))
        if found is None:
            message = f"The response '{response_id[:100]}' is not stored here"
            raise RequestError(message, code="not_found", param=param, status=404)
        return found[0]

    def delete(self, response_id: str) -> None:
        self.get(response_id)
        with self._lock:
            if (found := self._stored.pop(_key(response_id), None)) is not None:
                self._characters -= found[1]


def _key(response_id: str) -> tuple[str, str]:
    whose = tenant.get()
    return ("" if whose is None else whose.name, response_id)
