"""A network of pods on one machine: a namespace with an address for each, one switch, policies as their filters."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.deploy.rendering import Object

Result = TypeVar("Result")
_CLONE_NEWNET = 0x40000000


def why_not() -> str:
    """Why there can be no such network here, or ""."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "nft", "unshare", "setpriv") if shutil.which(program) is None]
    return f"{', '.join(missing)} is not installed (Debian: iproute2, nftables, util-linux)" if missing else ""


@dataclass
class Host:
    """One member of the network: a pod, or somebody outside of the release."""

    name: str  # of its network namespace
    address: str
    labels: dict[str, str]
    namespace: str


@dataclass
class Network:
    """Addresses 10.77.0.0/24. The node itself is at .1: kubelet's probes come from there, which no policy stops."""

    prefix: str
    hosts: list[Host] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(2))

    NODE = "10.77.0.1"

    @property
    def node(self) -> str:
        return f"{self.prefix}-node"

    def add(self, name: str, labels: dict[str, str], namespace: str = "default") -> Host:
        number = next(self._numbers)
        host = Host(f"{self.prefix}-{name}", f"10.77.0.{number}", labels, namespace)
        cable = f"v{number}"
        _ip("netns", "add", host.name)
        _ip("link", "add", cable, "netns", self.node, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        _ip("-n", self.node, "link", "set", cable, "master", "switch", "up")
        _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", host.name, "link", "set", device, "up")
        _ip("-n", host.name, "route", "add", "default", "via", self.NODE)
        self.hosts.append(host)
        return host

    def apply(self, policies: Iterable[Object], namespace: str = "default") -> None:
        """Make the policies of a namespace the filters of its pods."""
        policies = list(policies)
        for host in self.hosts:
            if host.namespace == namespace:
                rules = "\n".join(self._rules(host, policies))
                subprocess.run(["ip", "netns", "exec", host.name, "nft", "-f", "-"], input=rules, text=True, check=True)

    def _rules(self, host: Host, policies: list[Object]) -> Iterator[str]:
        chosen = [policy["spec"] for policy in policies if _selects(policy["spec"]["podSelector"], host.labels)]
        yield "flush ruleset"
        yield "table inet pods {"
        for kind, hook, end in (("Ingress", "input", "saddr"), ("Egress", "output", "daddr")):
            yield f"chain {hook} {{ type filter hook {hook} priority 0; policy accept;"
            yield f"ct state established,related accept; {'iif' if hook == 'input' else 'oif'} lo accept"
            yield f"ip {end} {self.NODE} accept"
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


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    return all(labels.get(term["key"]) in term["values"] for term in selector.get("matchExpressions", []))


def _port(port: Object) -> str:
    if "port" not in port:
        return ""
    numbers = f"{port['port']}-{port['endPort']}" if "endPort" in port else port["port"]
    return f"{port.get('protocol', 'TCP').lower()} dport {numbers} "


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def network() -> Iterator[Network]:
    """A network of its own, gone afterwards."""
    made = Network(f"em{os.getpid()}")
    _ip("netns", "add", made.node)
    try:
        _ip("-n", made.node, "link", "add", "switch", "type", "bridge")
        _ip("-n", made.node, "addr", "add", f"{made.NODE}/24", "dev", "switch")
        for device in ("lo", "switch"):
            _ip("-n", made.node, "link", "set", device, "up")
        yield made
    finally:
        for name in (*(host.name for host in made.hosts), made.node):
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)


def within(name: str, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call `function` as somebody in the network namespace `name`: what it connects to, it reaches from there."""

    def call() -> Result:
        descriptor = os.open(f"/var/run/netns/{name}", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {name}")
        finally:
            os.close(descriptor)
        return function(*arguments)

    with ThreadPoolExecutor(1) as thread:  # a thread of its own, since it stays there
        return thread.submit(call).result()
