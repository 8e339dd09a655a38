"""Where a model comes from: the default one, a directory, the Hugging Face hub; and how to make one."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cluster.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(model: str) -> Path:
    """The local directory of `model`: `default` (built if it is missing), a directory, or a hub id (downloaded).

    Shows progress on standard error. Raises CheckpointError. What is in the directory is not checked here.
    """
    if model == "default":
        return _default()
    directory = Path(os.path.expanduser(model))  # unlike Path.expanduser, takes an unknown user for a name
    if model and directory.is_dir():
        return directory
    if directory.is_file():
        raise CheckpointError(f"{model}: is a file, not a checkpoint directory")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model!r}: no such directory, and not a hub id (`owner/name`)")
    return _download(model)


# The imports below are slow, and most commands of the command line need none of them.


def _default() -> Path:
    from cluster.models.default import default_model
    from cluster.models.progress import progress_bar

    with progress_bar("default model") as report:
        return default_model(report)


def _download(hub_id: str) -> Path:
    from cluster.models.hub import fetch

    return fetch(hub_id)
