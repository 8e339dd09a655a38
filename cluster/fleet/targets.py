"""The file from which Prometheus' file discovery learns of the cluster's processes, in its run directory."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from cluster.observe.discovery import Target, target_groups

NAME = "prometheus_targets.json"


def write(run_dir: Path, targets: Iterable[Target], cluster: str) -> None:
    """Replace the file where its content changed: Prometheus watches it. A full disk costs the file alone."""
    content = json.dumps(target_groups(targets, cluster), indent=2)
    path = run_dir / NAME
    draft = run_dir / f"{NAME}.{os.getpid()}"
    with contextlib.suppress(OSError):
        if path.exists() and path.read_text(encoding="utf-8") == content:
            return
        draft.write_text(content, encoding="utf-8")
        draft.replace(path)
