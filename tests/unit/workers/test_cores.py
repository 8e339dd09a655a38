"""Would catch a process that runs two threads where its container has half a core, and stands still for most of each
period; or one that takes a quota of another group, or of a file it does not understand, for its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from workers.cores import available_cores, cpu_quota

V2 = "30 1 0:26 / {base}/unified rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 1 0:27 {root} {base}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n32 1 0:28 / {base}/memory rw - cgroup c rw,memory\n"
)


def system(base: Path, mounts: str, groups: str, files: dict[str, str], root: str = "/") -> Path:
    """A `/proc/self`, and control groups with these files."""
    proc = base / "proc"
    proc.mkdir()
    (proc / "mountinfo").write_text(mounts.format(base=base, root=root) + "1 0 0:1 / / rw - ext4 /dev/sda rw\n")
    (proc / "cgroup").write_text(groups)
    for name, text in files.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text + "\n")
    return proc


@pytest.mark.parametrize(
    ("mounts", "groups", "files", "quota"),
    [
        (V2, "0::/a/b\n", {"unified/a/b/cpu.max": "50000 100000"}, 0.5),
        (V2, "0::/a/b\n", {"unified/a/cpu.max": "150000 100000", "unified/a/b/cpu.max": "max 100000"}, 1.5),
        (V2, "0::/\n", {"unified/cpu.max": "200000 100000"}, 2.0),  # the group's own root, in a container
        (V2, "0::/a\n", {"unified/a/cpu.max": "max 100000", "unified/other/cpu.max": "1000 100000"}, None),
        (V2, "0::/a\n", {"unified/a/cpu.max": ""}, None),
        (V1, "4:cpu,cpuacct:/k\n", {"cpu/k/cpu.cfs_quota_us": "100000", "cpu/k/cpu.cfs_period_us": "100000"}, 1.0),
        (V1, "4:cpu,cpuacct:/k\n", {"cpu/k/cpu.cfs_quota_us": "-1", "cpu/k/cpu.cfs_period_us": "100000"}, None),
        (V1, "5:cpuset:/k\n", {"cpu/k/cpu.cfs_quota_us": "1000", "cpu/k/cpu.cfs_period_us": "100000"}, None),
        (
            V1 + V2,
            "4:cpu:/k\n0::/k\n",
            {"cpu/k/cpu.cfs_quota_us": "300000", "cpu/k/cpu.cfs_period_us": "100000", "unified/k/cpu.max": "1 2"},
            0.5,
        ),
        ("", "0::/\n", {}, None),
    ],
)
def test_the_least_quota_of_the_groups_it_is_in(
    tmp_path: Path, mounts: str, groups: str, files: dict[str, str], quota: float | None
) -> None:
    assert cpu_quota(system(tmp_path, mounts, groups, files)) == quota


def test_a_container_sees_its_group_under_the_hosts_path(tmp_path: Path) -> None:
    files = {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}
    assert cpu_quota(system(tmp_path, V1, "4:cpu,cpuacct:/docker/x\n", files, root="/docker/x")) == 0.5


@pytest.mark.parametrize(
    ("quota", "environ", "cores"),
    [
        ("50000 100000", {}, 1),
        ("max 100000", {"OMP_NUM_THREADS": "1"}, 1),
        ("max 100000", {"OMP_NUM_THREADS": "1,4"}, 1),
        ("max 100000", {"OMP_NUM_THREADS": "many"}, len(os.sched_getaffinity(0))),
        ("6400000 100000", {"OMP_NUM_THREADS": "0"}, 1),
    ],
)
def test_cores_are_whole_and_never_none(tmp_path: Path, quota: str, environ: dict[str, str], cores: int) -> None:
    proc = system(tmp_path, V2, "0::/\n", {"unified/cpu.max": quota})
    assert available_cores(environ, proc) == cores


def test_a_real_quota_is_followed() -> None:
    group = next((Path(p) for p in ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup") if os.access(p, os.W_OK)), None)
    if group is None:
        pytest.skip("control groups can be made by root alone")
    group /= f"expertmesh-test-{os.getpid()}"
    try:
        group.mkdir()
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text("100000 100000")
        elif (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_quota_us").write_text("100000")
        else:
            pytest.skip("the CPU controller is not given to this control group")
        code = "import sys, os; open(sys.argv[1], 'w').write(str(os.getpid())); from workers.cores import *"
        command = [sys.executable, "-c", f"{code}; print(available_cores({{}}))", str(group / "cgroup.procs")]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"
    except PermissionError:
        pytest.skip("control groups are mounted read-only")
    finally:
        if group.exists():
            group.rmdir()
