"""Which names a gateway that asks for no key is called by.

A page that a browser on this machine shows can make a name of its own lead to 127.0.0.1 (DNS rebinding) and would then
read answers. Its requests carry that name.
"""

from __future__ import annotations

import ipaddress

from cluster.config import Config
from cluster.errors import RequestError
from cluster.gateway.keys import is_loopback


class Hosts:
    """Names allowed in `Host`: addresses, localhost and `config.allowed_hosts`; every name where a key is asked for or
    others are meant to reach the gateway."""

    def __init__(self, config: Config) -> None:
        self._closed = config.api_keys_file is None and is_loopback(config.host)
        self._allowed = {"localhost", *filter(None, (name.strip().lower() for name in config.allowed_hosts.split(",")))}

    def check(self, host: bytes) -> None:
        """Raise RequestError (403) for another name."""
        if not self._closed or not host:
            return
        name = host.decode("latin-1").lower()
        name = name[1 : name.find("]")] if name.startswith("[") else name.rpartition(":")[0] or name
        if name in self._allowed or name.endswith(".localhost"):
            return
        try:
            ipaddress.ip_address(name)
        except ValueError:
            message = "This server is not known by that name; add it to `allowed_hosts`"
            raise RequestError(message, code="invalid_host", status=403) from None
