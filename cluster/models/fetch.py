"""A model put into a directory of its own, whole or not at all, for processes that share a volume."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.errors import CheckpointError
from cluster.models.default import build_default
from cluster.models.hub import fetch
from cluster.models.lock import locked
from cluster.models.progress import progress_bar
from cluster.models.upcycle import Progress

COMPLETE = ".expertmesh-complete"  # written last: what is in the directory


def fetch_into(model: str, dest: Path, revision: str | None = None) -> None:
    """Put `model`, a hub id or `default`, into `dest`. At once where it is there; who is second waits for the first.

    What a process that was killed had fetched is not fetched again. Raises CheckpointError.
    """
    wanted = {"model": model, "revision": revision}
    dest = dest.absolute()
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with progress_bar(model) as report, locked(dest.with_name(f".{dest.name}.lock"), report):
            marker = dest / COMPLETE
            if marker.is_file():
                if (there := json.loads(marker.read_text(encoding="utf-8"))) != wanted:
                    raise CheckpointError(
                        f"{dest} holds {there['model']} ({there['revision']}): name another directory"
                    )
                return
            _fetch(model, dest, revision, report)
            marker.write_text(json.dumps(wanted), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{dest}: {error}") from error


def _fetch(model: str, dest: Path, revision: str | None, progress: Progress) -> None:
    if model == "default":
        build_default(dest, progress)
    elif "/" in model:
        fetch(model, revision, dest)
    else:
        raise CheckpointError(f"{model!r} is neither `default` nor a hub id (`owner/name`)")
