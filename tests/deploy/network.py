"""A network of pods on one machine: a namespace with an address for each, one switch, policies as their filters.

A namespace lives as long as somebody has it open, here this process: whichever way it ends, nothing is left.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.deploy.rendering import Object

Result = TypeVar("Result")
_CLONE_NEWNET = 0x40000000
_PROGRAMS = ("ip", "nft", "nsenter", "unshare", "setpriv")


def why_not() -> str:
    """Why there can be no such network here, or ""."""
    if os.geteuid() != 0:
        return "networks and root file systems of pods need root"
    if missing := [program for program in _PROGRAMS if shutil.which(program) is None]:
        return f"{', '.join(missing)} is not installed (Debian: iproute2, nftables, util-linux)"
    made = subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "true"], capture_output=True, text=True)
    return made.stderr.strip()


@dataclass
class Host:
    """One member of the network: a pod, or somebody outside of the release."""

    address: str
    labels: Mapping[str, str]
    namespace: str  # of Kubernetes
    door: int  # file descriptor of its network namespace

    @property
    def path(self) -> str:
        """By which other processes find the network namespace, as long as this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.door}"

    def run(self, *command: str, text: str = "") -> None:
        """A program, there."""
        subprocess.run(
            ["nsenter", f"--net={self.path}", *command], input=text, text=True, check=True, capture_output=True
        )

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call `function` as somebody there: what it connects to it reaches from there, what it listens on is there."""

        def entered() -> Result:
            _check(_libc.setns(self.door, _CLONE_NEWNET))
            return function(*arguments)

        with ThreadPoolExecutor(1) as thread:  # a thread of its own, since it stays there
            return thread.submit(entered).result()


@dataclass
class Network:
    """Addresses 10.77.0.0/24. The node itself is at .1: kubelet's probes come from there, which no policy stops."""

    NODE = "10.77.0.1"

    node: Host = field(default_factory=lambda: Host(Network.NODE, {}, "", _namespace()))
    hosts: list[Host] = field(default_factory=list)
    policies: list[Object] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # what the cluster's name server knows
    _services: dict[str, str] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(2))

    def __post_init__(self) -> None:
        address = f"addr add {self.NODE}/24 dev switch"
        _ip(self.node, "link add switch type bridge", address, "link set lo up", "link set switch up")

    def add(self, labels: Mapping[str, str], namespace: str = "default") -> Host:
        number = next(self._numbers)
        host = Host(f"10.77.0.{number}", labels, namespace, _namespace())
        cable = f"link add v{number} type veth peer name eth0 netns {host.path}"
        _ip(self.node, cable, f"link set v{number} master switch up")
        _ip(host, f"addr add {host.address}/24 dev eth0", "link set lo up", "link set eth0 up")
        _ip(host, f"route add default via {self.NODE}")
        self.hosts.append(host)
        return host

    def close(self) -> None:
        for host in (*self.hosts, self.node):
            os.close(host.door)

    def publish(self, service: Object, address: str, endpoints: Sequence[tuple[str, int]]) -> None:
        """What kube-proxy does: connections to a Service's name and port go to one of its endpoints."""
        self.names[service["metadata"]["name"]] = address
        targets = ", ".join(f"{number} : {host} . {port}" for number, (host, port) in enumerate(endpoints))
        chosen = f"dnat ip to numgen random mod {len(endpoints)} map {{ {targets} }}" if endpoints else "reject"
        self._services[address] = f"ip daddr {address} tcp dport {service['spec']['ports'][0]['port']} {chosen}"
        self.refresh()

    def refresh(self) -> None:
        """Make the policies, and what was published, rules of all hosts: each one that is added changes them."""
        for host in self.hosts:
            host.run("nft", "-f", "-", text="\n".join(["flush ruleset", *self._filters(host), *self._nat()]))

    def _nat(self) -> Iterator[str]:
        rules = "\n".join(self._services.values())
        yield f"table ip services {{ chain output {{ type nat hook output priority -100;\n{rules}\n}}\n}}"

    def _filters(self, host: Host) -> Iterator[str]:
        mine = [policy["spec"] for policy in self.policies if policy["metadata"]["namespace"] == host.namespace]
        chosen = [spec for spec in mine if _selects(spec["podSelector"], host.labels)]
        yield "table inet policies {"
        for kind, hook, end in (("Ingress", "input", "saddr"), ("Egress", "output", "daddr")):
            yield f"chain {hook} {{ type filter hook {hook} priority 0; policy accept;"
            yield f"ct state established,related accept; {'iif' if hook == 'input' else 'oif'} lo accept"
            if hook == "input":
                yield f"ip saddr {self.NODE} accept"
            closed = [spec for spec in chosen if kind in spec["policyTypes"]]
            for rule in (rule for spec in closed for rule in spec.get(kind.lower()) or []):
                peers = rule.get("from" if kind == "Ingress" else "to")
                addresses = sorted({address for peer in peers or () for address in self._addresses(peer, host)})
                if peers is not None and not addresses:
                    continue
                where = f"ip {end} {{ {', '.join(addresses)} }} " if addresses else ""
                for port in rule.get("ports") or [{}]:
                    yield f"{where}{_port(port)}accept"
            if closed:
                yield "meta l4proto { tcp, udp } reject"
            yield "}"
        yield "}"

    def _addresses(self, peer: Object, host: Host) -> Iterator[str]:
        if "ipBlock" in peer:
            yield peer["ipBlock"]["cidr"]
            return
        for other in self.hosts:
            if "namespaceSelector" in peer:
                there = _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace})
            else:
                there = other.namespace == host.namespace
            if there and _selects(peer.get("podSelector", {}), other.labels):
                yield other.address


@contextmanager
def network() -> Iterator[Network]:
    """A network of its own, gone afterwards."""
    made = Network()
    try:
        yield made
    finally:
        made.close()


_libc = ctypes.CDLL(None, use_errno=True)


def _namespace() -> int:
    """A new network namespace, as a file descriptor."""

    def make() -> int:
        _check(_libc.unshare(_CLONE_NEWNET))
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def _check(code: int) -> None:
    if code != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _ip(host: Host, *commands: str) -> None:
    host.run("ip", "-batch", "-", text="\n".join(commands))


def _selects(selector: Object, labels: Mapping[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    return all(labels.get(term["key"]) in term["values"] for term in selector.get("matchExpressions", []))


def _port(port: Object) -> str:
    if "port" not in port:
        return ""
    numbers = f"{port['port']}-{port['endPort']}" if "endPort" in port else port["port"]
    return f"{port.get('protocol', 'TCP').lower()} dport {numbers} "
