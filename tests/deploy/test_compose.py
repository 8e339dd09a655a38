"""deploy/compose.yaml, as far as can be told without Docker: what it names is there and fits together."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml

from cluster.config import Config
from cluster.config_load import load
from tests.deploy.promtool import DEPLOY

COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def plain(text: str) -> str:
    """With the defaults of variables, as nobody has set any."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def mounts(service: str) -> dict[str, str]:
    """Where in the container -> what of this machine, or the volume."""
    parts = (volume.split(":") for volume in SERVICES[service]["volumes"])
    return {target: source for source, target, *_ in parts}


def inside(service: str, path: str) -> str:
    """What of this machine a path in the container is."""
    target = max((t for t in mounts(service) if PurePosixPath(path).is_relative_to(t)), key=len)
    return str(PurePosixPath(mounts(service)[target]) / PurePosixPath(path).relative_to(target))


def test_everything_that_is_mounted_exists() -> None:
    """Docker would make an empty directory of a path that does not."""
    for service in SERVICES:
        for source in mounts(service).values():
            if source.startswith("."):
                assert (DEPLOY / source).is_dir(), source
            else:
                assert source in COMPOSE["volumes"]
    assert set(COMPOSE) == {"name", "services", "volumes"}
    build = SERVICES["gateway"]["build"]
    assert (DEPLOY / build["context"] / "pyproject.toml").is_file()


def test_images_are_pinned_and_ports_are_of_this_machine_alone() -> None:
    for service in SERVICES.values():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-\w+)?", plain(service["image"])), service["image"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert set(service.get("depends_on", [])) <= SERVICES.keys()
    version = re.search(r'^version = "(.*)"', (DEPLOY.parent / "pyproject.toml").read_text(), re.M)
    assert version and plain(SERVICES["gateway"]["image"]).endswith(f":{version[1]}-cpu")


def test_the_gateway_starts_with_what_it_is_given() -> None:
    """Would catch an option that was renamed, and one that does not fit the others."""
    verb, model = map(plain, SERVICES["gateway"]["command"])
    environment = {name: plain(str(value)) for name, value in SERVICES["gateway"]["environment"].items()}
    names = {name.removeprefix("EXPERTMESH_").lower() for name in environment}
    config = load({"model": model}, environment).config
    assert verb == "serve" and names <= set(Config.__dataclass_fields__)
    assert config.host == "0.0.0.0" and config.port == 8000 and config.expert_workers == 2
    assert str(config.state_dir) in mounts("gateway")


def test_prometheus_scrapes_the_gateway_and_grafana_asks_prometheus() -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    ((target,),) = [static["targets"] for job in scraped["scrape_configs"] for static in job["static_configs"]]
    host, port = target.split(":")
    assert SERVICES[host]["environment"]["EXPERTMESH_PORT"] == port
    config_file = SERVICES["prometheus"]["command"][0].removeprefix("--config.file=")
    assert (DEPLOY / inside("prometheus", config_file)).is_file()

    provisioning = DEPLOY / inside("grafana", "/etc/grafana/provisioning")
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    url = urlsplit(source["url"])
    assert url.hostname in SERVICES and SERVICES[url.hostname]["ports"] == [f"127.0.0.1:{url.port}:{url.port}"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "expertmesh.yml").read_text())["providers"]
    boards = DEPLOY / inside("grafana", provider["options"]["path"])
    assert {path.name for path in boards.glob("*.json")} == {
        "balance.json",
        "exchange.json",
        "fleet.json",
        "serving.json",
    }
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / inside("grafana", home)).is_file()
