"""Who takes part in a collective exchange, and the store in which its processes find each other."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the controller and the gateways hear of groups and need no torch
    from torch._C._distributed_c10d import TCPStore


@dataclass(frozen=True, slots=True)
class Group:
    """The processes of one process group. Ranks: the routers in this order, then the workers."""

    number: int  # rises with every new group, over restarts of whoever forms them: its keys in the store begin with it
    store: str  # host:port of the store that the first router hosts
    routers: tuple[str, ...]  # at least one
    workers: tuple[str, ...]  # at least one
    pids: tuple[int, ...]  # by rank: a process that was restarted is not the one the group means

    @property
    def members(self) -> tuple[str, ...]:
        """The names of all, by rank."""
        return self.routers + self.workers

    def rank(self, name: str, pid: int) -> int | None:
        """The rank of the process `pid` called `name`; None when the group does not mean it."""
        ranks = (rank for rank, member in enumerate(zip(self.members, self.pids, strict=True)) if member == (name, pid))
        return next(ranks, None)


def host_store(host: str) -> tuple[TCPStore, str]:
    """A store for the groups whose first router this process is, and its address, host:port.

    It lives until it is garbage and listens on `host` alone: it has neither authentication nor encryption.
    Raises OSError when `host` is not an address of this machine.
    """
    from torch._C._distributed_c10d import TCPStore

    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((host, 0), family=family, backlog=256)
    port = listener.getsockname()[1]
    # The store takes the descriptor over and closes it.
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
