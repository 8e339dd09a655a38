"""What a line of the table of series says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Setter = Literal["gateway", "router", "expert worker", "controller", "every process"]

# The label with which a series names the process that set it.
OWN_LABEL: dict[Setter, str | None] = {
    "gateway": "gateway",
    "router": "router",
    "expert worker": "worker",
    "controller": None,
    "every process": "process",
}


@dataclass(frozen=True, slots=True)
class Series:
    """One series. Counters run since the start of their process; units are base units."""

    name: str  # as it is scraped; counters end in `_total`
    kind: Kind
    unit: str  # "" for plain counts of things the name says
    set_by: Setter
    labels: tuple[str, ...]  # beside the one that names the process
    help: str
    buckets: tuple[float, ...] = ()  # upper bounds of a histogram's, ascending, without infinity
    vllm: str = ""  # name under which vLLM has the same

    @property
    def all_labels(self) -> tuple[str, ...]:
        """The labels, that of the process first."""
        own = OWN_LABEL[self.set_by]
        return self.labels if own is None else (own, *self.labels)

    @property
    def per_expert(self) -> bool:
        """Whether there is one for each expert of each layer: what large models can leave out."""
        return "expert" in self.labels


# The bounds that vLLM's histograms have, so that quantiles can be compared.
REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
NEXT_TOKEN_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
TOKENS = (
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0, 100000.0,
)  # fmt: skip
STEP_ROWS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
CALL_SIZES = tuple(float(2**k) for k in range(15))
# Ours: an exchange takes from 0.1 ms in memory to seconds when a worker is awaited.
EXCHANGE_SECONDS = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
