"""What the Ray actors of the cluster have in common: the address they serve at, and how they start or end."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Protocol

import ray

_log = logging.getLogger(__name__)

_LAST_WORD_S = 2.0


class Loading(Protocol):
    """A checkpoint that is being read."""

    @property
    def bytes_read(self) -> int: ...


def loading(source: Loading | None) -> dict[str, object]:
    """What a member that loads `source` says of itself for people; nothing without one."""
    return {} if source is None else {"loaded_bytes": source.bytes_read}


def checkpoint_here(path: str, model: str) -> Path:
    """The checkpoint on this node: where it was when the cluster was planned, else where `model` leads to here."""
    if Path(path).is_dir():
        return Path(path)
    from cluster.models import resolve

    return resolve(model)


def node_address() -> str:
    """The address of this machine that Ray uses: 127.0.0.1 in a Ray of our own."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def start_or_end(start: Coroutine[Any, Any, str], name: str) -> asyncio.Task[str]:
    """Run `start`, which returns the address that the member `name` serves at, in a task.

    A member that cannot start ends after it could say why to whoever awaits the task; Ray tries again.
    """

    def end_if_failed(started: asyncio.Task[str]) -> None:
        if (error := started.exception()) is not None:
            _log.error("%s cannot start", name, exc_info=error)
            started.get_loop().call_later(_LAST_WORD_S, os._exit, 1)

    task = asyncio.get_event_loop().create_task(start)
    task.add_done_callback(end_if_failed)
    return task
