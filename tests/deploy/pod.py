"""A pod as local processes: its own network, processes, root file system (read-only if it says so), volumes, user and
environment, from the manifest alone. What the image brings is this machine's Python environment."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.deploy.network import Host, Network
from tests.deploy.rendering import ROOT, Object
from workers.kernels.cpu.library import object_file

ACCOUNT = "/run/secrets/kubernetes.io/serviceaccount"  # where /var/run leads

# Makes the root file system, enters it, and becomes the container's first process. Names are in /etc/hosts alone.
_SETUP = """
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs {base}
mkdir {base}/upper {base}/work {base}/root
mount -t overlay overlay -o lowerdir=/,upperdir={base}/upper,workdir={base}/work {base}/root
cd {base}/root
mount -t proc proc proc
mount --rbind /dev dev
mount --rbind /sys sys
chmod o+x {parents}
mkdir -p state models
printf '%s\\n' {hosts} > etc/hosts
printf 'nameserver 127.0.0.1\\n' > etc/resolv.conf
hostname {name}
{mounts}
{read_only}
exec chroot {base}/root {become} env -i -C /state {environment} {command}
"""


@dataclass(frozen=True)
class Sources:
    """What the volumes of pods are made of."""

    secrets: Mapping[str, Mapping[str, str]]
    claims: Mapping[str, Path]
    account: Path  # token and certificate for the API server


class Container:
    """One container of a pod, running from its beginning."""

    def __init__(self, pod: Pod, spec: Object) -> None:
        self.spec, self._pod = spec, pod
        self.log = pod.directory / f"{spec['name']}.log"
        base = pod.directory / f"{spec['name']}-root"
        base.mkdir()
        names = {"localhost": "127.0.0.1", **pod.network.names, pod.name: pod.host.address}
        script = _SETUP.format(
            base=base,
            parents=shlex.join(_parents()),
            name=pod.name,
            hosts=shlex.join(f"{address} {name}" for name, address in names.items()),
            mounts="\n".join(line for mount in self._mounts() for line in pod.mount(mount)),
            read_only="mount -o remount,ro ." if spec["securityContext"]["readOnlyRootFilesystem"] else "",
            become=shlex.join([*self._become(), "--pdeathsig", "KILL"]),
            environment=shlex.join(self.environment()),
            command=shlex.join([*spec["command"], *spec["args"]]),
        )
        # Who ends the first process of a PID namespace ends all of them. It ends when its parent does, and that when
        # this process does; who becomes another user has to ask for it again.
        command = ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net={pod.host.path}", "unshare", "--mount", "--uts",
                   "--ipc", "--pid", "--fork", "--kill-child", "bash", "-c", script]  # fmt: skip
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def _mounts(self) -> list[Object]:
        account = [{"name": "", "mountPath": ACCOUNT, "readOnly": True}]
        return [
            *self.spec.get("volumeMounts", []),
            *(account if self._pod.spec["automountServiceAccountToken"] else []),
        ]

    def _become(self) -> list[str]:
        context = self._pod.spec["securityContext"]
        ids = ["--reuid", str(context["runAsUser"]), "--regid", str(context["runAsGroup"]), "--clear-groups"]
        return ["setpriv", *ids, "--no-new-privs", "--bounding-set", "-all"]

    def environment(self) -> list[str]:
        """The image's, Kubernetes' own, and what the manifest says."""
        found = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin", "PYTHONPATH": str(ROOT),
            "HOME": "/state", "KUBERNETES_SERVICE_HOST": "kubernetes.default", "KUBERNETES_SERVICE_PORT_HTTPS": "443",
        }  # fmt: skip
        for variable in self.spec["env"]:
            source = variable.get("valueFrom", {})
            if "fieldRef" in source:
                found[variable["name"]] = self._pod.field(source["fieldRef"]["fieldPath"])
            elif "secretKeyRef" in source:
                secret = self._pod.sources.secrets[source["secretKeyRef"]["name"]]
                found[variable["name"]] = secret[source["secretKeyRef"]["key"]]
            else:
                found[variable["name"]] = variable["value"]
        return [f"{name}={value}" for name, value in found.items()]

    def execute(self, command: list[str], timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """A command in the container, as `kubectl exec` and kubelet's hooks have it."""
        inside = ["nsenter", "--target", str(self._first()), "--all", "--root", "--wd", *self._become()]
        full = [*inside, "env", "-i", *self.environment(), *command]
        return subprocess.run(full, capture_output=True, text=True, timeout=timeout_s, check=False)

    def _first(self) -> int:
        """Its first process, once that is in its root file system."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for first in psutil.Process(self._process.pid).children():
                if os.readlink(f"/proc/{first.pid}/root") != "/":
                    return first.pid
            time.sleep(0.05)
        raise AssertionError(f"{self.spec['name']} did not start:\n{self.text()}")

    def wait(self, timeout_s: float) -> int:
        return self._process.wait(timeout_s)

    def running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """SIGKILL to all of its processes."""
        for first in psutil.Process(self._process.pid).children() if self.running() else ():
            first.kill()
        self._process.kill()
        self._process.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


class Pod:
    """A pod that runs; init containers are the test's matter."""

    def __init__(self, network: Network, manifest: Object, sources: Sources, directory: Path) -> None:
        self.name, self.labels = manifest["metadata"]["name"], manifest["metadata"]["labels"]
        self.network, self.sources, self._manifest = network, sources, manifest
        self.spec: Object = manifest["spec"]
        self.host: Host = network.add(self.labels)
        self.directory = directory / self.name
        self.directory.mkdir()
        self._volumes = {volume["name"]: volume for volume in self.spec.get("volumes", [])}
        self.containers: list[Container] = []

    def start(self) -> None:
        self.containers = [Container(self, spec) for spec in self.spec["containers"]]

    @property
    def main(self) -> Container:
        return self.containers[0]

    def field(self, path: str) -> str:
        if path == "status.podIP":
            return self.host.address
        if path.startswith("metadata.labels["):
            return str(self.labels[path.removeprefix("metadata.labels['").removesuffix("']")])
        return str(self._manifest["metadata"][path.removeprefix("metadata.")])

    def mount(self, mount: Object) -> list[str]:
        """Lines of a shell that mount a volume into a container's root, where they run."""
        path = mount["mountPath"].lstrip("/")
        volume = self._volumes[mount["name"]] if mount["name"] else None
        if volume is None:
            source = self.sources.account
        elif "secret" in volume:
            source = self._volume(volume["name"], partial(self._write_secret, volume["secret"]))
        elif "persistentVolumeClaim" in volume:
            source = self.sources.claims[volume["persistentVolumeClaim"]["claimName"]]
        elif volume["emptyDir"].get("medium") == "Memory":
            return [f"mkdir -p {path}", f"mount -t tmpfs -o mode=1777,size=50% tmpfs {path}"]
        else:
            source = self._volume(volume["name"], _open_to_all if volume["name"] != "state" else _with_kernels)
        lines = [f"mkdir -p {path}", f"mount --bind {source} {path}"]
        return [*lines, f"mount -o remount,bind,ro {path}"] if mount.get("readOnly") else lines

    def _volume(self, name: str, fill: Callable[[Path], None]) -> Path:
        path = self.directory / f"volume-{name}"
        if not path.exists():
            path.mkdir()
            fill(path)
        return path

    def _write_secret(self, secret: Object, directory: Path) -> None:
        for item in secret["items"]:
            (directory / item["path"]).write_text(self.sources.secrets[secret["secretName"]][item["key"]])

    def probe(self, kind: str) -> bool:
        """What kubelet does, from the node: whether `startupProbe`, `readinessProbe` or `livenessProbe` succeeds."""
        rule = self.main.spec[kind]
        url = f"http://{self.host.address}:{rule['httpGet']['port']}{rule['httpGet']['path']}"
        try:
            return bool(self.network.node.call(_get, url, rule["timeoutSeconds"]).is_success)
        except httpx.HTTPError:
            return False

    def wait(self, kind: str, timeout_s: float = 180) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.probe(kind):
            assert self.main.running(), f"{self.name} ended:\n{self.main.text()}"
            assert time.monotonic() < deadline, f"{self.name}: {kind} fails after {timeout_s} s:\n{self.main.text()}"
            time.sleep(0.3)

    def drain(self) -> str:
        """The preStop hook, as kubelet runs it; what it says."""
        result = self.main.execute(self.main.spec["lifecycle"]["preStop"]["exec"]["command"])
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    def end(self) -> None:
        for container in self.containers:
            container.end()


def _get(url: str, timeout_s: float) -> Any:
    with httpx.Client(trust_env=False, timeout=timeout_s) as client:
        return client.get(url)


def _open_to_all(directory: Path) -> None:
    directory.chmod(0o1777)


def _with_kernels(directory: Path) -> None:
    """The CPU kernels as an earlier start left them: building them takes half a minute in each pod."""
    kernels = directory / "expertmesh" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / object_file().name).write_bytes(object_file().read_bytes())
    (directory / ".cache").symlink_to(".")
    for path in (directory, kernels.parent, kernels):
        path.chmod(0o777)


def _parents() -> list[str]:
    """Directories on the way to Python and to the code, which a home of root's hides from others."""
    ways = (Path(path) for path in (ROOT, sys.prefix, sys.base_prefix))
    found = {str(parent).lstrip("/") for path in ways for parent in (path, *path.parents)}
    return sorted(found - {""})
