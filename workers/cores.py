"""How many CPU cores this process may use: the affinity mask, the quota of its control group, and OMP_NUM_THREADS.

A process that runs more threads than its quota has cores uses the quota up early in each period and stands still for
the rest of it, in the midst of a step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

_PROC = Path("/proc/self")


def available_cores(environ: Mapping[str, str] = os.environ, proc: Path = _PROC) -> int:
    """Whole cores for computing, at least 1. `proc` is the process's directory in procfs."""
    cores = [len(os.sched_getaffinity(0))]
    if (quota := cpu_quota(proc)) is not None:
        cores.append(int(quota))
    asked = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list has one number for each level of nesting
    if asked.isdecimal():
        cores.append(int(asked))
    return max(1, min(cores))


def cpu_quota(proc: Path = _PROC) -> float | None:
    """CPU time per second that the control groups of the process allow, the least of them; None without a limit.

    Both versions of cgroups are read, since systems mix them.
    """
    quotas = [quota for directory in _directories(proc) if (quota := _quota(directory)) is not None]
    return min(quotas, default=None)


def _directories(proc: Path) -> Iterator[Path]:
    """The directories of the process's groups that may limit its CPU time, and of those they are in."""
    for mount_root, mount_point, controllers in _mounts(proc):
        for line in _read(proc / "cgroup").splitlines():
            _, names, path = line.split(":", 2)
            if (names == "" and controllers is None) or (controllers is not None and "cpu" in names.split(",")):
                # In a container the mount often shows the group alone, while the path is the host's.
                inside = PurePosixPath(path)
                relative = inside.relative_to(mount_root) if inside.is_relative_to(mount_root) else PurePosixPath()
                directory = mount_point / relative
                while directory.is_relative_to(mount_point):
                    yield directory
                    directory = directory.parent


def _mounts(proc: Path) -> Iterator[tuple[str, Path, str | None]]:
    """Root, mount point and controllers (None: version 2) of each mounted hierarchy that has the CPU controller."""
    for line in _read(proc / "mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.partition(" ")
        root, point = fields.split()[3:5]
        if kind == "cgroup2":
            yield root, Path(point), None
        elif kind == "cgroup" and "cpu" in options.split()[-1].split(","):
            yield root, Path(point), options


def _quota(directory: Path) -> float | None:
    quota, _, period = _read(directory / "cpu.max").partition(" ")  # version 2
    if not quota:
        quota, period = _read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")
    try:
        return int(quota) / int(period) if int(quota) > 0 else None
    except (ValueError, ZeroDivisionError):  # "max", or no such file
        return None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
