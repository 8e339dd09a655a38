"""The chart, rendered: what helm makes of values, as objects."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.deploy import tools

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "expertmesh"
CASES = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
HELMS = tuple(tools.HELM)
NEWEST = HELMS[0]

Object = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """All objects of one rendering."""

    objects: tuple[Object, ...]

    def all(self, kind: str) -> list[Object]:
        return [thing for thing in self.objects if thing["kind"] == kind]

    def one(self, kind: str, name: str | None = None) -> Object:
        found = [thing for thing in self.all(kind) if name is None or thing["metadata"]["name"] == name]
        assert len(found) == 1, f"{len(found)} of {kind} {name or ''}"
        return found[0]

    @property
    def cluster(self) -> Object:
        """The spec of the RayCluster, wherever it is."""
        service = self.all("RayService")
        return dict(service[0]["spec"]["rayClusterConfig"] if service else self.one("RayCluster")["spec"])

    @property
    def serve(self) -> Object:
        """The configuration of Ray Serve."""
        service = self.all("RayService")
        if service:
            return dict(yaml.safe_load(service[0]["spec"]["serveConfigV2"]))
        config = next(thing for thing in self.all("ConfigMap") if "serve.yaml" in thing["data"])
        return dict(yaml.safe_load(config["data"]["serve.yaml"]))

    @property
    def arguments(self) -> Object:
        """What the Serve application is given."""
        return dict(self.serve["applications"][0]["args"])

    def templates(self) -> Iterator[tuple[str, Object]]:
        """(group, pod template) of every pod that KubeRay or a Job makes."""
        yield "head", self.cluster["headGroupSpec"]["template"]
        for group in self.cluster["workerGroupSpecs"]:
            yield group["groupName"], group["template"]
        for job in self.all("Job"):
            yield job["metadata"]["name"], job["spec"]["template"]


def helm(*arguments: str | Path, version: str = NEWEST) -> subprocess.CompletedProcess[str]:
    command = [str(tools.helm(version)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def render(*arguments: str | Path, version: str = NEWEST, release: str = "r") -> Rendered:
    """`helm template RELEASE helm/expertmesh ARGUMENTS`."""
    result = helm("template", release, CHART, *arguments, version=version)
    assert result.returncode == 0, result.stderr
    return Rendered(tuple(thing for thing in yaml.load_all(result.stdout, yaml.CSafeLoader) if thing))


def case(name: str, *more: str, version: str = NEWEST) -> Rendered:
    """One of ci/*-values.yaml."""
    return render("-f", CASES[name], *more, version=version)
