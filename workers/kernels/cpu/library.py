"""The object file of the compiled CPU kernels: built once per machine in a process of its own, then mapped.

numba and its compiler take 100 MB and seconds, which no serving process shall have. The file lies in the user's cache
directory under a name made of the sources, the compiler and the processor.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

from workers import wire
from workers.kernels import message
from workers.kernels.cpu.immortal import immortal

_BUILD_SECONDS = 600
_BUILD_BYTES = 8 * 2**20  # more than the file and what is written on the way to it
_log = logging.getLogger(__name__)

_lock = threading.Lock()
_loaded: list[Any] = []


@functools.cache
def usable() -> bool:
    """Whether the kernels could be built and loaded here. If not, said once in the log, everything is plain torch."""
    try:
        library()
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        _log.warning("the CPU kernels are not available, plain torch is used instead: %s", error)
        return False
    return True


def library() -> Any:
    """The execution engine that holds the machine code."""
    with _lock:
        if not _loaded:
            _loaded.append(_load())
        return _loaded[0]


def _load() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_path(os.fspath(object_file())))
    engine.finalize_object()
    return immortal(engine)


def object_file() -> Path:
    """The object file of exactly these sources for this machine; built first if there is none."""
    name = f"{_digest()}.o"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertmesh" / "kernels"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise PermissionError(root)
        if not (root / name).is_file() and shutil.disk_usage(root).free < _BUILD_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(root))
    except OSError:
        root = Path(tempfile.gettempdir()) / f"expertmesh-kernels-{os.getuid()}"
        root.mkdir(mode=0o700, exist_ok=True)
        if root.stat().st_uid != os.getuid():
            raise RuntimeError(f"{root} belongs to somebody else") from None
    path = root / name
    if not path.is_file():
        with (root / "build.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # processes that start together build it once
            if not path.is_file():
                _log.info("building the CPU kernels, once: %s", path)
                _build(path)
    return path


def _build(path: Path) -> None:
    command = [sys.executable, "-m", "workers.kernels.cpu.build", os.fspath(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        command, env=environment, timeout=_BUILD_SECONDS, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode != 0:
        _log.debug("%s", done.stderr)
        raise RuntimeError(f"building them failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")


def _digest() -> str:
    """What the machine code depends on."""
    import llvmlite.binding as llvm

    digest = hashlib.sha256()
    layout = (Path(message.__file__), Path(wire.__file__))
    for path in (*sorted(Path(__file__).parent.rglob("*.py")), *layout):
        digest.update(path.read_bytes())
    for fact in (
        version("numba"),
        version("llvmlite"),
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
    ):
        digest.update(fact.encode() + b"\0")
    return digest.hexdigest()[:20]
