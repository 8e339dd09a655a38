"""What an API server would say of an object: Kubernetes' own schemas, KubeRay's CRDs, published ones of others."""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from tests.deploy import tools
from tests.deploy.rendering import ROOT, Object

KUBERNETES = ("1.31", "1.36")  # the oldest and the newest of the strict schemas that are looked at
_OTHERS = ("monitoring.coreos.com/v1", "gateway.networking.k8s.io/v1", "cert-manager.io/v1")


def check(thing: Object) -> str:
    """ "" or what is wrong with an object of Kubernetes itself or of KubeRay."""
    if thing["apiVersion"] == "ray.io/v1":
        validators = [_crd(thing["kind"])]
    else:
        validators = [_kubernetes(thing["apiVersion"], thing["kind"], version) for version in KUBERNETES]
    for validator in validators:
        for error in validator.iter_errors(thing):
            return f"{'.'.join(map(str, error.path))}: {error.message[:300]}"
    return ""


def check_others(things: list[Object]) -> list[str]:
    """The same of objects whose schemas npm has, all at once: a process of node takes a second."""
    program, directory = tools.schema_validator()
    result = subprocess.run(
        ["node", str(program)], input=json.dumps(things), cwd=directory, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return [error or "" for error in json.loads(result.stdout)]


def is_others(thing: Object) -> bool:
    return thing["apiVersion"] in _OTHERS


@cache
def _kubernetes(api_version: str, kind: str, version: str) -> Any:
    """kubernetes-validate's strict schema of a kind; its own function reads all files anew for each object."""
    directory, registry = _definitions(version)
    group = api_version.replace(".networking.k8s.io", "-networking").replace("networking.k8s.io", "networking")
    name = f"{kind}-{group.replace('/', '-')}.json".lower()
    return jsonschema.Draft7Validator(json.loads((directory / name).read_text()), registry=registry)


@cache
def _definitions(version: str) -> tuple[Path, Registry[Any]]:
    directory = next(Path(kubernetes_validate.__file__).parent.glob(f"*/v{version}.*-local-strict"))
    content = json.loads((directory / "_definitions.json").read_text(encoding="utf-8"))
    found = Resource.from_contents(content, default_specification=DRAFT7)
    return directory, Registry().with_resource("_definitions.json", found).crawl()


@cache
def _crd(kind: str) -> Any:
    """KubeRay's own schema, in which unknown fields are refused: an API server would drop them without a word."""
    directory = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "crds"))
    path = directory / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        tools.missing(f"{path} is not there; KUBERAY_CRDS names a directory with KubeRay's CRDs")
    content = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
    version = next(v for v in content["spec"]["versions"] if v["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own
    _refuse_unknown(schema)
    return jsonschema.Draft7Validator(schema)


def _refuse_unknown(schema: Any) -> None:
    if not isinstance(schema, dict):
        return
    if schema.get("x-kubernetes-int-or-string"):
        schema.clear()
        schema["type"] = ["integer", "string"]
        return
    if "properties" in schema:
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for part in schema["properties"].values():
            _refuse_unknown(part)
    for key in ("items", "additionalProperties"):
        _refuse_unknown(schema.get(key))
