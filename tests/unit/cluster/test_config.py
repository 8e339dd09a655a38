"""Catches an option that is read under another name, a wrong precedence, a lost origin, or a value let through."""

import socket
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from cluster.config import Config
from cluster.config_load import HINTS, load
from cluster.errors import ConfigError
from workers.weights import FORMATS


def yaml_file(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    return file


def test_defaults_have_origin_default() -> None:
    loaded = load({}, {})
    assert loaded.config == Config()
    assert set(loaded.origins) == {f.name for f in fields(Config)}
    assert set(loaded.origins.values()) == {"default"}


def test_experts_may_be_kept_in_every_format_there_is() -> None:
    """A format that nobody can choose is none; the names are spelled out because --help must not import torch."""
    assert get_args(HINTS["expert_dtype"]) == ("auto", *FORMATS)


def test_nearest_wins_and_is_named(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "port: 1\nrouters: 2\nblock_size: 8\nkv_cache_mb: 9\n")
    environ = {"EXPERTMESH_PORT": "2", "EXPERTMESH_ROUTERS": "3"}
    loaded = load({"port": 3, "host": None}, environ, file)
    assert (loaded.config.port, loaded.config.routers, loaded.config.block_size) == (3, 3, 8)
    assert loaded.origins["port"] == "--port"
    assert loaded.origins["routers"] == "EXPERTMESH_ROUTERS"
    assert loaded.origins["block_size"] == str(file)
    assert loaded.origins["host"] == "default"


def test_every_option_is_read_from_environment_and_yaml(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-1\n")
    pem = tmp_path / "pem"
    pem.write_text("-----BEGIN CERTIFICATE-----\n")
    special = {
        "transport": "grpc",
        "dtype": "bfloat16",
        "router_device": "cpu",
        "expert_device": "cuda",
        "expert_dtype": "fp8",
        "gpus_per_router": "0.5",
        "gpus_per_expert_worker": "0.25",
        "gpu_memory_utilization": "0.7",
        "log_level": "debug",
        "log_format": "json",
        "max_body_bytes": "2048",
        "api_keys_file": str(keys),
        "admin_token_file": str(keys),
        "tls_cert": str(pem),
        "tls_key": str(pem),
        "tls_ca": str(pem),
        "allow_no_keys": "true",
        "generation_defaults": "false",
        "trusted_network": "true",
        "state_dir": str(tmp_path),
        "tool_call_parser": "hermes",
        "rebalance": "off",
        "weights": "peer",
        "per_expert_metrics": "auto",
        "routing_trace": str(tmp_path),
        "routing_trace_sample": "0.5",
        "rebalance_min_gain": "0.2",
        "autoscale": "advise",
        "autoscale_kv_use": "0.5",
        "autoscale_worker_use": "0.5",
    }
    default = {f.name: "true" if HINTS[f.name] is bool else "7" for f in fields(Config)}
    values = default | special
    from_env = load({}, {f"EXPERTMESH_{name.upper()}": value for name, value in values.items()})
    from_yaml = load({}, {}, yaml_file(tmp_path, "".join(f"{name}: {value}\n" for name, value in values.items())))
    assert from_env.config == from_yaml.config
    assert "default" not in set(from_env.origins.values()) | set(from_yaml.origins.values())


def test_config_file_and_ray_address_from_environment(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "port: 11\n")
    loaded = load(
        {}, {"EXPERTMESH_CONFIG": str(file), "RAY_ADDRESS": "10.0.0.1:6379", "EXPERTMESH_TRUSTED_NETWORK": "1"}
    )
    assert loaded.config.port == 11
    assert loaded.config.ray_address == "10.0.0.1:6379"
    assert loaded.origins["ray_address"] == "RAY_ADDRESS"


@pytest.mark.parametrize(
    ("given", "environ", "says"),
    [
        ({}, {"EXPERTMESH_PORT": "http"}, r"port \(EXPERTMESH_PORT\): 'http' is not a whole number"),
        ({"port": 70000}, {}, r"port \(--port\): 70000 must be between 1 and 65535"),
        ({"expert_workers": -1}, {}, r"expert_workers \(--expert-workers\): -1 must be at least 0"),
        (
            {"transport": "carrier-pigeon"},
            {},
            r"transport \(--transport\): .* is not one of auto, local, device, shm, grpc, collective",
        ),
        ({}, {"EXPERTMESH_ALLOW_NO_KEYS": "maybe"}, r"allow_no_keys .* is not true or false"),
        ({}, {"EXPERTMESH_REPLY_TIMEOUT_S": "nan"}, r"reply_timeout_s .* is not a number"),
        ({"drain_timeout_s": float("inf")}, {}, r"drain_timeout_s .* is not a number"),
        ({"api_keys_file": "~nobody-of-this-name/keys"}, {}, r"api_keys_file .* is not a file"),
        ({"transport": "local", "routers": 2}, {}, r"routers \(--routers\): 2 needs expert workers"),
        ({"expert_workers": 0, "routers": 2}, {}, r"routers \(--routers\): 2 needs expert workers"),
        ({"expert_workers": 0, "transport": "grpc"}, {}, r"transport \(--transport\): 'grpc' needs expert workers"),
        ({"host": "0.0.0.0"}, {}, r"host \(--host\): .* no API keys"),
        ({"host": "::"}, {}, r"host \(--host\): .* no API keys"),
        ({"host": "example.org"}, {}, r"host \(--host\): .* no API keys"),
        ({"api_keys_file": "/nowhere/keys"}, {}, r"api_keys_file \(--api-keys-file\): .* is not a file"),
    ],
)
def test_refusals_name_option_and_origin(given: dict[str, object], environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(given, environ)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"ray_address": "10.0.0.1:6379"}, r"ray_address .*in the clear.*--tls-cert.*--trusted-network"),
        ({"tls_cert": "pem"}, r"tls_cert \(--tls-cert\).* needs the two others"),
        ({"tls_cert": "pem", "tls_key": "nowhere", "tls_ca": "pem"}, r"--tls-key .*nowhere: No such file"),
        ({"tls_cert": "pem", "tls_key": "pem", "tls_ca": "noise"}, r"--tls-ca .*noise: not a PEM file"),
    ],
)
def test_other_machines_see_rows_and_prompts_with_tls_or_by_the_explicit_flag_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, object], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pem").write_text("-----BEGIN CERTIFICATE-----\n")
    Path("noise").write_text("noise")
    with pytest.raises(ConfigError, match=says):
        load(given, {})
    tls = dict.fromkeys(("tls_cert", "tls_key", "tls_ca"), "pem")
    for allowed in (tls, {"trusted_network": True}):
        assert load({"ray_address": "10.0.0.1:6379", **allowed}, {}).config.ray_address is not None


COLLECTIVE = {"transport": "collective"}
JOINED = {**COLLECTIVE, "ray_address": "10.0.0.1:6379"}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"collective_interface": "lo"},
        {"collective_interface": "127.0.0.1"},
        {"collective_interface": "wire0", "trusted_network": True},
        {"collective_interface": "192.0.2.7", "trusted_network": True},
        {"collective_interface": "eth7", "trusted_network": True, "ray_address": "10.0.0.1:6379"},
    ],
)
def test_collective_on_loopback_or_a_trusted_interface(wires: None, given: dict[str, object]) -> None:
    assert load({**COLLECTIVE, **given}, {}).config.transport == "collective"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"collective_interface": "wire0"}, r"collective_interface .*: 'wire0' .* neither authenticates nor encrypts"),
        ({"collective_interface": "192.0.2.7"}, "neither authenticates nor encrypts"),
        ({"collective_interface": "nowhere"}, r"has no interface or address nowhere; it has lo, wire0"),
        (JOINED, "neither authenticates nor encrypts"),
        ({**JOINED, "trusted_network": True}, "--collective-interface NAME and --trusted-network"),
        ({**JOINED, "collective_interface": "wire0"}, "--collective-interface NAME and --trusted-network"),
    ],
)
def test_collective_is_refused_where_others_reach_it(wires: None, given: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load({**COLLECTIVE, **given}, {})


@pytest.fixture
def wires(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with loopback and one wire."""
    entries = {"lo": "127.0.0.1", "wire0": "192.0.2.7"}
    found = {name: [SimpleNamespace(family=socket.AF_INET, address=address)] for name, address in entries.items()}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: found)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert load({"host": host}, {}).config.host == host


def test_beyond_loopback_with_keys_or_the_explicit_flag(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-1\n")
    assert load({"host": "0.0.0.0", "api_keys_file": keys}, {}).config.api_keys_file == keys
    assert load({"host": "0.0.0.0", "allow_no_keys": True}, {}).config.allow_no_keys


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot: 1\n", "unknown option prot"),
        ("- port\n", "expected `option: value` lines"),
        ("port: [1\n", "not YAML"),
        ("port: true\n", "port .*serve.yaml.*: True is not a whole number"),
        ("port: 80.5\n", "80.5 is not a whole number"),
        ("host: [a]\n", "is not a text"),
    ],
)
def test_yaml_mistakes(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load({}, {}, yaml_file(tmp_path, text))


def test_missing_config_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config .*nowhere.yaml: No such file"):
        load({}, {}, tmp_path / "nowhere.yaml")


def test_what_kubernetes_puts_into_the_environment_is_no_option() -> None:
    """A Service called `expertmesh` sets EXPERTMESH_PORT in every pod of its namespace."""
    loaded = load({}, {"EXPERTMESH_PORT": "tcp://10.96.0.12:8000", "EXPERTMESH_PORT_8000_TCP": "tcp://10.96.0.12:8000"})
    assert loaded.config.port == 8000 and loaded.origins["port"] == "default"
    (note,) = loaded.notes
    assert note.startswith("EXPERTMESH_PORT=tcp://10.96.0.12:8000 is ignored")
    with pytest.raises(ConfigError, match="port"):
        load({}, {"EXPERTMESH_PORT": "tcp"})


def test_paths_are_absolute_for_processes_that_work_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text("k")
    assert load({"api_keys_file": "keys"}, {}).config.api_keys_file == tmp_path / "keys"
