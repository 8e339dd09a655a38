"""API keys, and when a gateway may do without."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from hashlib import sha256
from pathlib import Path

from cluster.config import Config
from cluster.errors import ConfigError
from cluster.gateway.tenants import Tenant, TenantLimits

_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LIMITS = tuple(field.name for field in fields(TenantLimits))


class ApiKeys:
    """Keys, of which only the SHA-256 is kept, and whose they are."""

    def __init__(self, tenants: Mapping[bytes, Tenant]):
        """`tenants`: by digest of a key."""
        self._tenants = dict(tenants)

    @classmethod
    def from_file(cls, path: Path, n_gateways: Callable[[], int] = lambda: 1) -> ApiKeys:
        """One key per line, as it is or as `sha256:` and 64 hex digits; empty lines and `#` comments are skipped.

        After a key `name=...` may say whose it is (keys of one name share everything), and `max_open=`,
        `requests_per_minute=`, `tokens_per_minute=` how much that one may ask for, of `n_gateways` gateways together.
        Raises ConfigError where the file cannot be read, holds no key, or a broken line; the message shows no key.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_keys_file: {path}: {error}") from error
        tenants: dict[bytes, Tenant] = {}
        named: dict[str, Tenant] = {}
        for number, line in enumerate(map(str.strip, lines), start=1):
            if not line or line.startswith("#"):
                continue
            where = f"api_keys_file: {path}:{number}"
            key, *words = line.split()
            digest = _digest(key, where)
            name, limits = _options(words, where)
            tenant = Tenant(name or digest.hex()[:12], limits, n_gateways)
            tenants[digest] = known = named.setdefault(tenant.name, tenant)
            if limits not in (known.limits, TenantLimits()):
                raise ConfigError(f"{where}: another line gives {name!r} other limits; one line is enough for them")
        if not tenants:
            raise ConfigError(f"api_keys_file: {path} holds no key")
        return cls(tenants)

    def tenant_of(self, authorization: str | None) -> Tenant | None:
        """Whose key the `Authorization` header carries; None: nobody's. All are compared, each in constant time."""
        scheme, _, key = (authorization or "").partition(" ")
        digest = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        return found if scheme.lower() == "bearer" else None


def _options(words: Iterable[str], where: str) -> tuple[str, TenantLimits]:
    """The name and the limits of `name=value` words."""
    values: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in ("name", *_LIMITS) or name in values:
            options = ", ".join(f"{each}=" for each in ("name", *_LIMITS))
            raise ConfigError(f"{where}: what follows a key is at most one each of {options}")
        if name in _LIMITS and not (value.isascii() and value.isdigit() and 0 < int(value) < 2**31):
            raise ConfigError(f"{where}: {name} must be a whole number above 0")
        if name == "name" and _NAME.fullmatch(value) is None:
            raise ConfigError(f"{where}: a name has up to 64 letters, digits, and any of . _ -")
        values[name] = value
    return values.pop("name", ""), TenantLimits(**{name: int(value) for name, value in values.items()})


def _digest(key: str, where: str) -> bytes:
    if key.startswith("sha256:"):
        hashed = _HASHED.fullmatch(key)
        if hashed is None:
            raise ConfigError(f"{where}: `sha256:` must be followed by 64 hex digits")
        return bytes.fromhex(hashed[1])
    if not key.isascii():
        raise ConfigError(f"{where}: a key is one word of ASCII characters")
    return sha256(key.encode()).digest()


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
