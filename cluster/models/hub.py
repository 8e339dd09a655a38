"""A model on the Hugging Face hub: what is read of it is fetched, or found in the cache, and nothing else."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path

from cluster.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = f"{_SINGLE}.index.json"
_NEEDED = ("config.json", "tokenizer.json")
_READ = (
    *_NEEDED, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "chat_template.json", _INDEX,
)  # fmt: skip


def fetch(hub_id: str, revision: str | None = None, into: Path | None = None) -> Path:
    """The local directory of `hub_id` (`owner/name`), complete; files that are in the cache are not fetched again.

    `revision`: branch, tag or commit. With `into` the files go to that directory, not to the cache.

    Repositories often hold the same weights several times (as pickles, consolidated, in another dtype): only the
    files that the index names are fetched. Shows progress, in bytes, on standard error. Without a connection a
    cached copy serves that has all that is read, however it got there. Raises CheckpointError.
    """
    # Slow to import, and most commands need it not.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # By the commit, so that index and weights are of one version.
        commit = revision if into is None else HfApi().model_info(hub_id, revision=revision or "main").sha
        directory = Path(snapshot_download(hub_id, revision=commit, allow_patterns=list(_READ), local_dir=into))
        weights = [glob.escape(file) for file in _weight_files(directory)]
        commit = directory.name if into is None else commit
        return Path(snapshot_download(hub_id, revision=commit, allow_patterns=[*_READ, *weights], local_dir=into))
    except CheckpointError:
        raise
    except LocalEntryNotFoundError as error:  # offline, or the hub is down
        if into is not None:
            raise _cannot(hub_id, error) from error
        return _cached(hub_id, error)
    except Exception as error:  # network, permission, name: a dozen classes, all of which mean this
        raise _cannot(hub_id, error) from error


def _weight_files(directory: Path) -> list[str]:
    """The safetensors files that the model in `directory` consists of."""
    index = directory / _INDEX
    if not index.is_file():
        return [_SINGLE]
    try:
        return sorted({str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{index}: has no `weight_map` from tensors to files") from error


def _cached(hub_id: str, error: Exception) -> Path:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    if not isinstance(config, str):
        raise _cannot(hub_id, error) from error
    directory = Path(os.path.dirname(config))
    missing = [file for file in (*_NEEDED, *_weight_files(directory)) if not (directory / file).is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CheckpointError(f"{hub_id}: the hub cannot be reached, and {directory} lacks {shown}") from error
    return directory


def _cannot(hub_id: str, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"{hub_id}: cannot be fetched from the Hugging Face hub: {reason}")
