"""Catches a cluster that ends, with all that it serves, because its controller hangs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import ExpertMeshError, RayGone
from cluster.fleet import serve as module
from cluster.fleet.signals import Stopped


class Hanging:
    """A controller that says nothing until it is ended; each question waits for ten seconds."""

    def __init__(self, comes_back: bool) -> None:
        self.now = 0.0
        self.ended = 0
        self._comes_back = comes_back

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def news(self, timeout_s: float) -> object:
        if self.ended and self._comes_back:
            return object()
        self.now += 10.0
        raise RayGone("the controller does not answer")

    def end_controller(self) -> bool:
        self.ended += 1
        return True


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_controller_that_hangs_is_ended_so_that_ray_starts_another(
    comes_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Hanging(comes_back)
    monkeypatch.setattr(module, "time", cluster)
    monkeypatch.setattr(module, "snapshot", SimpleNamespace(write=lambda *_: None))
    seen: list[object] = []

    def check() -> None:
        if seen:
            raise Stopped

    signals: Any = SimpleNamespace(check=check)
    watch: Any = SimpleNamespace(see=seen.append)
    with pytest.raises(Stopped if comes_back else ExpertMeshError):
        module._supervise(cluster, None, lambda: None, signals, watch)  # type: ignore[arg-type]
    assert cluster.ended == 1
