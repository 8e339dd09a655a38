"""API keys, and when a gateway may do without."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from cluster.config import Config
from cluster.errors import ConfigError

_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")


class ApiKeys:
    """A set of keys, of which only the SHA-256 is kept."""

    def __init__(self, digests: Iterable[bytes]):
        self._digests = tuple(digests)

    @classmethod
    def from_file(cls, path: Path) -> ApiKeys:
        """One key per line, as it is or as `sha256:` and 64 hex digits; empty lines and `#` comments are skipped.

        Raises ConfigError where the file cannot be read, holds no key, or a broken line; the message shows no key.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_keys_file: {path}: {error}") from error
        digests = [
            _digest(line, f"{path}:{number}")
            for number, line in enumerate(map(str.strip, lines), start=1)
            if line and not line.startswith("#")
        ]
        if not digests:
            raise ConfigError(f"api_keys_file: {path} holds no key")
        return cls(digests)

    def accepts(self, authorization: str | None) -> bool:
        """Whether the `Authorization` header carries one of the keys. Every key is compared, each in constant time."""
        scheme, _, key = (authorization or "").partition(" ")
        digest = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found and scheme.lower() == "bearer"


def _digest(line: str, where: str) -> bytes:
    if line.startswith("sha256:"):
        hashed = _HASHED.fullmatch(line)
        if hashed is None:
            raise ConfigError(f"api_keys_file: {where}: `sha256:` must be followed by 64 hex digits")
        return bytes.fromhex(hashed[1])
    if len(line.split()) != 1 or not line.isascii():
        raise ConfigError(f"api_keys_file: {where}: a key is one word of ASCII characters")
    return sha256(line.encode()).digest()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # another name: it may mean any address
        return False


def check_exposure(config: Config) -> None:
    """Raise ConfigError where the gateway would listen beyond this machine without keys, unless that is allowed."""
    if not (config.api_keys_file or config.allow_no_keys or is_loopback(config.host)):
        raise ConfigError(
            f"host: {config.host} can be reached from other machines, and no API key would be asked for; "
            "set api_keys_file, or allow_no_keys if that is meant"
        )
