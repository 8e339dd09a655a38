"""A pod as local processes: its own network, processes, root file system (read-only if it says so), volumes, user and
environment, from the manifest alone. What the image brings is this machine's Python environment."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.deploy.network import Host, Network, within
from tests.deploy.rendering import ROOT, Object

Secrets = Mapping[str, Mapping[str, str]]

# Makes the root file system, enters it, and becomes the container's first process.
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
chmod o+x root
printf '127.0.0.1 localhost\\n%s\\n' {hosts} > etc/hosts
hostname {name}
{mounts}
{read_only}
exec chroot {base}/root setpriv --reuid {user} --regid {group} --clear-groups --no-new-privs --bounding-set -all \\
  env -i {environment} {command}
"""


class Pod:
    """One pod that runs. Its container is the first of the manifest; init containers are the test's matter."""

    def __init__(
        self, network: Network, manifest: Object, secrets: Secrets, claims: Mapping[str, Path], directory: Path,
        *, head: Host | None = None,
    ) -> None:  # fmt: skip
        self.name = manifest["metadata"]["name"]
        self.container = manifest["spec"]["containers"][0]
        self.host = network.add(self.name, manifest["metadata"]["labels"])
        self._network, self._spec, self._secrets, self._claims = network, manifest["spec"], secrets, claims
        self._base = directory / self.name
        self._base.mkdir()
        self.log = directory / f"{self.name}.log"
        self._head = head or self.host
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        context, container = self._spec["securityContext"], self.container
        script = _SETUP.format(
            base=self._base,
            name=self.name,
            hosts=shlex.quote(f"{self._head.address} raycluster-head-svc\n{self.host.address} {self.name}"),
            mounts="\n".join(self._mounts()),
            read_only="mount -o remount,ro ." if container["securityContext"]["readOnlyRootFilesystem"] else "",
            user=context["runAsUser"],
            group=context["runAsGroup"],
            environment=" ".join(shlex.quote(f"{name}={value}") for name, value in self.environment().items()),
            command=shlex.join([*container["command"], *container["args"]]),
        )
        # Whoever ends the first process of a PID namespace ends all of them.
        command = ["ip", "netns", "exec", self.host.name, "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork",
                   "--kill-child", "bash", "-c", script]  # fmt: skip
        with self.log.open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def _mounts(self) -> list[str]:
        volumes = {volume["name"]: volume for volume in self._spec["volumes"]}
        lines = []
        for mount in self.container["volumeMounts"]:
            path, volume = mount["mountPath"].lstrip("/"), volumes[mount["name"]]
            lines.append(f"mkdir -p {path}")
            if "secret" in volume:
                source = self._base.with_name(f"{self.name}-{mount['name']}")
                source.mkdir(exist_ok=True)
                for item in volume["secret"]["items"]:
                    (source / item["path"]).write_text(self._secrets[volume["secret"]["secretName"]][item["key"]])
                lines.append(f"mount --bind {source} {path}")
            elif "persistentVolumeClaim" in volume:
                lines.append(f"mount --bind {self._claims[volume['persistentVolumeClaim']['claimName']]} {path}")
            else:
                lines.append(f"mount -t tmpfs -o mode=1777,size=50% tmpfs {path}")
            if mount.get("readOnly"):
                lines.append(f"mount -o remount,bind,ro {path}")
        return lines

    def environment(self) -> dict[str, str]:
        """Of the container: the image's, and what the manifest says."""
        found = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin", "PYTHONPATH": str(ROOT)}
        for variable in self.container["env"]:
            source = variable.get("valueFrom", {})
            if "fieldRef" in source:
                found[variable["name"]] = {"status.podIP": self.host.address}[source["fieldRef"]["fieldPath"]]
            elif "secretKeyRef" in source:
                found[variable["name"]] = self._secrets[source["secretKeyRef"]["name"]][source["secretKeyRef"]["key"]]
            else:
                found[variable["name"]] = variable["value"]
        return found

    def probe(self, kind: str) -> bool:
        """What kubelet does, from the node: whether `startupProbe`, `readinessProbe` or `livenessProbe` succeeds."""
        rule = self.container[kind]
        url = f"http://{self.host.address}:{rule['httpGet']['port']}{rule['httpGet']['path']}"
        try:
            return within(self._network.node, _get, url, rule["timeoutSeconds"]).is_success
        except httpx.HTTPError:
            return False

    def wait(self, kind: str, timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.probe(kind):
            assert self._process.poll() is None, f"{self.name} ended:\n{self.text()}"
            assert time.monotonic() < deadline, f"{self.name}: {kind} fails after {timeout_s} s:\n{self.text()}"
            time.sleep(0.3)

    def drain(self, timeout_s: float = 120) -> str:
        """The preStop hook, in the pod as kubelet runs it; what it says."""
        command = self.container["lifecycle"]["preStop"]["exec"]["command"]
        environ = [f"{name}={value}" for name, value in self.environment().items()]
        first = psutil.Process(self._process.pid).children()[0].pid
        inside = ["nsenter", "--target", str(first), "--all", "--root", "--wd", "env", "-i", *environ, *command]
        result = subprocess.run(inside, capture_output=True, text=True, timeout=timeout_s, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def end(self) -> None:
        """SIGKILL to the first process, with which all of the pod end."""
        if self._process.poll() is None:
            for first in psutil.Process(self._process.pid).children():
                first.kill()
            self._process.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def _get(url: str, timeout_s: float) -> Any:
    with httpx.Client(trust_env=False, timeout=timeout_s) as client:
        return client.get(url)
