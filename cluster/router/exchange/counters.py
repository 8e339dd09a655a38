"""What the exchange counts.

Legend: L layers, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class Counters:
    """Sums since start, for observability. Written by the step loop alone."""

    rows_LE: NDArray[np.int64]  # rows dispatched to each expert
    worker_rows: dict[str, int] = field(default_factory=dict)  # rows sent to each worker, one for each of their experts
    captured_steps: int = 0
    void_steps: int = 0  # captured steps that a worker did not answer in time, and that were computed again
    repairs: int = 0  # parts sent again after a loss
    sent_bytes: int = 0
    received_bytes: int = 0
    waited_seconds: float = 0.0  # for replies
    repair_seconds: float = 0.0  # from a loss to the reply of another replica or of the worker that came back
    compute_seconds: defaultdict[str, float] = field(
        default_factory=lambda: defaultdict(float)
    )  # by worker, as it says
