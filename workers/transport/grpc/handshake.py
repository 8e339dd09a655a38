"""What the two ends of an Exchange stream say to each other before the first rows, in the metadata of the call.

The router names whom it awaits; a worker of another name or model, found at a port that was used again, refuses with
both names. Where both are on one host the router offers faster ways for the pair, and the worker says which it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workers.transport.grpc.credentials import Metadata

EXPERTS_SERVICE = "expertmesh.experts.v1.Experts"
EXCHANGE_METHOD = f"/{EXPERTS_SERVICE}/Exchange"
WEIGHTS_METHOD = f"/{EXPERTS_SERVICE}/Weights"

_WORKER, _ROUTER, _MODEL, _EPOCH = (f"expertmesh-{name}" for name in ("worker", "router", "model", "epoch"))


@dataclass(frozen=True, slots=True)
class Hello:
    """A router's first words to a worker, or the worker's to the router."""

    worker: str  # the worker's id: awaited, or real
    router: str  # who calls
    model: str  # `Checkpoint.fingerprint`
    epoch: int = 0  # of the placement that the speaker works with

    @property
    def metadata(self) -> Metadata:
        """As it travels."""
        return (_WORKER, self.worker), (_ROUTER, self.router), (_MODEL, self.model), (_EPOCH, str(self.epoch))

    @classmethod
    def from_metadata(cls, values: Mapping[str, str]) -> Hello:
        """What the other end said; "" and 0 for what it left out."""
        epoch = values.get(_EPOCH, "")
        return cls(
            worker=values.get(_WORKER, ""),
            router=values.get(_ROUTER, ""),
            model=values.get(_MODEL, ""),
            epoch=int(epoch) if epoch.isascii() and epoch.isdigit() and len(epoch) < 20 else 0,
        )

    def objection(self, other: Hello) -> str | None:
        """Why the two do not belong together; None: they do."""
        if other.worker != self.worker:
            return f"this is worker {self.worker!r} (epoch {self.epoch}), not {other.worker!r}"
        if other.model != self.model:
            return f"worker {self.worker!r} serves model {self.model!r} (epoch {self.epoch}), not {other.model!r}"
        return None


def key(way: str, word: str) -> str:
    """The name under which a faster way says `word`: "offer", "accept" or "declined"."""
    return f"expertmesh-{way}-{word}"
