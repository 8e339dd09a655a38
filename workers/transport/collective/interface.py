"""Which address the collective transport is bound to, and whether it may be."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from workers.errors import ExpertMeshError

UNPROTECTED = (
    "torch.distributed neither authenticates nor encrypts: beyond loopback the collective transport needs "
    "--collective-interface NAME and --trusted-network"
)


def bind_address(interface: str | None, trusted: bool, default: str) -> str:
    """The address of `interface`, or `default` when none is named. `interface` may be an address itself.

    Raises ExpertMeshError when this machine does not have it, or when others can reach it and it was not named or the
    network is not `trusted`.
    """
    address = default if interface is None else _address_of(interface)
    if not ipaddress.ip_address(address).is_loopback and (interface is None or not trusted):
        raise ExpertMeshError(UNPROTECTED)
    return address


def interface_of(address: str) -> str | None:
    """The network interface that has `address`; None: none has."""
    for name, entries in psutil.net_if_addrs().items():
        if address in (entry.address for entry in entries):
            return name
    return None


def _address_of(interface: str) -> str:
    found = {
        name: [
            entry.address
            for entry in sorted(entries, key=lambda entry: entry.family)
            if entry.family in (socket.AF_INET, socket.AF_INET6)
        ]
        for name, entries in psutil.net_if_addrs().items()
    }
    if any(interface in addresses for addresses in found.values()):
        return interface
    # An address with a % is good on its link alone.
    for address in found.get(interface, []):
        if "%" not in address:
            return address
    raise ExpertMeshError(f"this machine has no interface or address {interface}; it has {', '.join(sorted(found))}")
