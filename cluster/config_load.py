"""Loads the configuration: defaults < YAML file < environment < command line, with the origin of each value."""

from __future__ import annotations

import ipaddress
import math
import os
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from cluster.config import Config
from cluster.errors import ConfigError, ExpertMeshError
from workers.transport.collective import interface
from workers.transport.grpc import credentials

PREFIX = "EXPERTMESH_"
# With `enableServiceLinks`, which is on by default, every Service of the namespace appears in the environment.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://\S+:\d+")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
HINTS = get_type_hints(Config)
FIELDS: dict[str, Field[Any]] = {f.name: f for f in fields(Config)}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration that was checked, and the origin of each value: `default`, a file, a variable or an option."""

    config: Config
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()  # what was left out of account, and why


def flag(name: str) -> str:
    """The command line's spelling of the field `name`."""
    return "--" + name.replace("_", "-")


def load(given: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None) -> Loaded:
    """The effective configuration. `given` holds what the command line names; None there means not named.

    Raises ConfigError naming the option and where its value came from.
    """
    if file is None and environ.get(PREFIX + "CONFIG"):
        file = Path(environ[PREFIX + "CONFIG"])
    found: dict[str, tuple[Any, str]] = {}
    if file is not None:
        found.update({name: (value, str(file)) for name, value in _read_yaml(file).items()})
    if environ.get("RAY_ADDRESS"):  # Ray's own variable, under Ray's own name
        found["ray_address"] = (environ["RAY_ADDRESS"], "RAY_ADDRESS")
    notes: list[str] = []
    for name in FIELDS:
        if (value := environ.get(variable := PREFIX + name.upper())) is None:
            continue
        if _SERVICE_LINK.fullmatch(value):
            notes.append(f"{variable}={value} is ignored: Kubernetes sets it for a Service of that name")
        else:
            found[name] = (value, variable)
    found.update({name: (value, flag(name)) for name, value in given.items() if value is not None})
    values = {name: _checked(name, value, origin) for name, (value, origin) in found.items()}
    origins = {name: found[name][1] if name in found else "default" for name in FIELDS}
    config = Config(**values)
    _check_together(config, origins)
    return Loaded(config, origins, tuple(notes))


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file}: not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file}: expected `option: value` lines, found a {type(content).__name__}")
    if unknown := [str(key) for key in content if key not in FIELDS]:
        raise ConfigError(f"{file}: unknown option {', '.join(unknown)}; `expertmesh config` lists them all")
    # `~` and an empty value mean what leaving the line out means.
    return {str(key): value for key, value in content.items() if value is not None}


def _checked(name: str, value: Any, origin: str) -> Any:
    hint = HINTS[name]
    optional = get_origin(hint) in (Union, types.UnionType)
    if optional:
        hint = next(arm for arm in get_args(hint) if arm is not type(None))
        if value == "":
            return None
    result = _typed(hint, value)
    if result is None:
        raise ConfigError(f"{name} ({origin}): {value!r} is not {_wanted(hint)}")
    low, high = FIELDS[name].metadata["at_least"], FIELDS[name].metadata["at_most"]
    if (low is not None and not result >= low) or (high is not None and not result <= high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{name} ({origin}): {value!r} must be {bounds}")
    return result


def _typed(hint: Any, value: Any) -> Any:
    """`value` as `hint` says, or None when it does not fit. Text comes from the environment, the rest from YAML."""
    if get_origin(hint) is Literal:
        if isinstance(value, bool):  # which is how YAML reads `on` and `off`
            value = "on" if value else "off"
        return value if value in get_args(hint) else None
    if hint is bool:
        if isinstance(value, bool):
            return value
        text = str(value).lower() if isinstance(value, str) else ""
        return text in _TRUE if text in _TRUE + _FALSE else None
    if isinstance(value, bool):
        return None
    if hint in (int, float):
        whole = isinstance(value, float) and hint is int
        try:
            number = hint(value) if isinstance(value, int | float | str) and not whole else None
            return number if number is None or math.isfinite(number) else None
        except (ValueError, OverflowError):
            return None
    if hint is Path:
        # Unlike Path.expanduser, this takes an unknown user for a name.
        # Absolute, since other processes work in other directories.
        return Path(os.path.abspath(os.path.expanduser(value))) if isinstance(value, str | Path) else None
    return str(value) if isinstance(value, str | int | float | Path) else None


def _wanted(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    names = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", str: "a text"}
    return names[hint]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_interface(config: Config, refuse: Callable[[str, str], ConfigError]) -> None:
    # In a Ray of our own every process is on loopback; in another one nobody knows before it is joined.
    if config.ray_address is not None and not (config.collective_interface and config.trusted_network):
        raise refuse("transport", f"is not protected: {interface.UNPROTECTED}")
    if config.ray_address is None:
        try:
            interface.bind_address(config.collective_interface, config.trusted_network, "127.0.0.1")
        except ExpertMeshError as error:
            raise refuse("collective_interface", f"cannot be used: {error}") from error


def tls_files(config: Config) -> credentials.Tls | None:
    """The files of mutual TLS; None without."""
    if config.tls_cert is None or config.tls_key is None or config.tls_ca is None:
        return None
    return credentials.Tls(*(path.absolute() for path in (config.tls_cert, config.tls_key, config.tls_ca)))


def _check_tls(config: Config, refuse: Callable[[str, str], ConfigError]) -> None:
    tls = tls_files(config)
    if tls is None:
        for name in ("tls_cert", "tls_key", "tls_ca"):
            if getattr(config, name) is not None:
                raise refuse(name, "needs the two others of --tls-cert, --tls-key and --tls-ca")
    else:
        try:
            tls.read()
        except ExpertMeshError as error:
            raise ConfigError(str(error)) from None
    # In a Ray of our own every process is on loopback; in another one nobody knows before it is joined.
    if config.ray_address is not None and tls is None and not config.trusted_network:
        raise refuse("ray_address", f"is not protected: {credentials.UNPROTECTED}")


def _check_together(config: Config, origins: Mapping[str, str]) -> None:
    def refuse(name: str, why: str) -> ConfigError:
        return ConfigError(f"{name} ({origins[name]}): {getattr(config, name)!r} {why}")

    if (config.transport == "local" or config.expert_workers == 0) and config.routers != 1:
        raise refuse("routers", "needs expert workers: without them the one router holds all experts")
    if config.transport in ("device", "shm", "grpc", "collective") and config.expert_workers == 0:
        raise refuse("transport", "needs expert workers")
    if config.transport == "collective":
        _check_interface(config, refuse)
    _check_tls(config, refuse)
    for least, most in (("min_routers", "max_routers"), ("min_expert_workers", "max_expert_workers")):
        if 0 < getattr(config, most) < getattr(config, least):
            raise refuse(most, f"is less than {least}: {getattr(config, least)}")
    if not config.host:
        raise refuse("host", "is empty; 0.0.0.0 listens on every address")
    if config.api_keys_file is not None and not config.api_keys_file.is_file():
        raise refuse("api_keys_file", "is not a file")
    if not is_loopback(config.host) and config.api_keys_file is None and not config.allow_no_keys:
        raise refuse(
            "host", "is reachable by others and no API keys are set: give --api-keys-file FILE, or --allow-no-keys"
        )
