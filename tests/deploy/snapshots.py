"""What the chart made of each values file when it was last read: `python -m tests.deploy.snapshots` writes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import yaml

from tests.deploy.rendering import CASES, Rendered, case

NAMES = tuple(CASES)
_FILE = Path(__file__).with_name("snapshots.yaml")
_DRAWN = "drawn at the install"


def digest(rendered: Rendered) -> list[str]:
    """One line for each object: kind, name and the beginning of a hash of what it says, and the containers of its pods.

    What is drawn at random, and what belongs to rules and dashboards, is left out.
    """
    lines = []
    for thing in rendered.objects:
        content = json.loads(json.dumps(thing))
        if thing["kind"] == "Secret":
            content["data"] = dict.fromkeys(content["data"], _DRAWN)
        if thing["kind"] == "PrometheusRule":
            content["spec"] = {}
        if thing["metadata"]["name"].endswith("-dashboards"):
            content["data"] = {}
        text = json.dumps(content, sort_keys=True)
        lines.append(f"{thing['kind']} {thing['metadata']['name']} {hashlib.sha256(text.encode()).hexdigest()[:12]}")
    return sorted(lines)


def snapshot(name: str) -> list[str]:
    return list(yaml.safe_load(_FILE.read_text(encoding="utf-8"))[name])


if __name__ == "__main__":
    _FILE.write_text(yaml.safe_dump({name: digest(case(name)) for name in NAMES}, sort_keys=True), encoding="utf-8")
