"""Where the controller's series are shown, and how many."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MetricsOptions:
    """`host`, and the first of the ports to try; 0: any."""

    host: str
    port: int
    per_expert: bool  # whether there are series for each expert and layer
