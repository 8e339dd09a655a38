"""Who may call: the cluster's token on every call, and mutual TLS where it is configured. Needs no torch."""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import os
import secrets
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.errors import ExpertMeshError

if TYPE_CHECKING:  # an actor has these before it has imported anything large
    import grpc

#: What the certificates of a cluster are issued for (subjectAltName, DNS): its processes come and go by address.
TLS_NAME = "expertmesh"
UNPROTECTED = (
    "beyond loopback, rows, prompts and the cluster's token would travel in the clear: give --tls-cert, --tls-key and "
    "--tls-ca, or --trusted-network"
)
_TOKEN = "expertmesh-token"

_log = logging.getLogger(__name__)

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Tls:
    """The PEM files of a process. Files that are replaced count from the next connection on."""

    cert: Path  # for `TLS_NAME`, good for servers and clients
    key: Path
    ca: Path  # that issued the certificates of all

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Key, certificate chain and authority. Raises ExpertMeshError naming the file."""
        key, cert, ca = (self._pem(path, option) for path, option in self._files)
        return key, cert, ca

    @property
    def _files(self) -> tuple[tuple[Path, str], ...]:
        return (self.key, "--tls-key"), (self.cert, "--tls-cert"), (self.ca, "--tls-ca")

    @staticmethod
    def _pem(path: Path, option: str) -> bytes:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ExpertMeshError(f"{option} {path}: {error.strerror}") from None
        if b"-----BEGIN " not in content:
            raise ExpertMeshError(f"{option} {path}: not a PEM file")
        return content


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a process of the cluster shows the others, and asks of them. Handed to it through Ray."""

    token: str = field(repr=False)
    tls: Tls | None = None
    trusted_network: bool = False  # to be reached without TLS by other machines

    @classmethod
    def generate(cls, tls: Tls | None = None, trusted_network: bool = False) -> Credentials:
        """The credentials of a new cluster."""
        return cls(secrets.token_hex(32), tls, trusted_network)

    def check_exposure(self, host: str) -> None:
        """Raises ExpertMeshError where a server on `host` could be overheard."""
        if self.tls is None and not self.trusted_network and not _is_loopback(host):
            raise ExpertMeshError(f"{host}: {UNPROTECTED}")

    @classmethod
    def read(cls, path: Path) -> Credentials:
        """What `write` wrote. Raises ExpertMeshError."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            tls = None if values["tls"] is None else Tls(*map(Path, values["tls"]))
            return cls(str(values["token"]), tls, bool(values["trusted_network"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ExpertMeshError(f"{path}: not the credentials of a cluster: {error}") from None

    def write(self, path: Path) -> None:
        """For processes of the same user, which is all who can read the new file. Raises OSError."""
        tls = None if self.tls is None else [str(each) for each in (self.tls.cert, self.tls.key, self.tls.ca)]
        content = {"token": self.token, "tls": tls, "trusted_network": self.trusted_network}
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(content, file)

    @property
    def metadata(self) -> Metadata:
        """For every call."""
        return ((_TOKEN, self.token),)

    def admits(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        """Whether a call with this metadata comes from the cluster. Takes as long for every wrong token."""
        shown = [value for name, value in metadata if name == _TOKEN]
        shown_bytes = b"".join(value if isinstance(value, bytes) else value.encode() for value in shown[:1])
        return hmac.compare_digest(shown_bytes, self.token.encode())

    def for_channel(self) -> grpc.ChannelCredentials | None:
        """For a new connection; None: without TLS. Raises ExpertMeshError when a file cannot be read."""
        if self.tls is None:
            return None
        import grpc

        key, cert, ca = self.tls.read()
        return grpc.ssl_channel_credentials(ca, key, cert)

    def for_server(self) -> grpc.ServerCredentials | None:
        """For a port; None: without TLS. Raises ExpertMeshError when a file cannot be read."""
        if self.tls is None:
            return None
        import grpc

        tls, current = self.tls, self.tls.read()

        def replaced() -> Any:
            nonlocal current
            try:
                found = tls.read()
            except ExpertMeshError as error:  # in the middle of being replaced
                _log.warning("%s; the certificate read before stays in use", error)
                return None
            if found == current:
                return None
            current = found
            return _configuration(found)

        first = _configuration(current)
        return grpc.dynamic_ssl_server_credentials(first, replaced, require_client_authentication=True)


def _is_loopback(host: str) -> bool:
    places = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return all(ipaddress.ip_address(str(place[0]).split("%", 1)[0]).is_loopback for *_, place in places)


def _configuration(files: tuple[bytes, bytes, bytes]) -> grpc.ServerCertificateConfiguration:
    import grpc

    key, cert, ca = files
    return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)
