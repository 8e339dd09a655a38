"""Series of the expert workers."""

from __future__ import annotations

from typing import Final

from cluster.observe.series.base import CALL_SIZES, Series

ROWS: Final = Series(
    "expertmesh_worker_computed_tokens_total", "counter", "", "expert worker", (),
    "Token rows computed, also those that were sent again after a loss",
)  # fmt: skip
COMPUTE: Final = Series(
    "expertmesh_worker_compute_seconds_total", "counter", "seconds", "expert worker", (), "Time spent computing"
)
WAITED: Final = Series(
    "expertmesh_worker_waited_seconds_total", "counter", "seconds", "expert worker", (),
    "Time that requests waited to be computed, all together: its rate is how many wait",
)  # fmt: skip
CALL_ROWS: Final = Series(
    "expertmesh_worker_call_tokens", "histogram", "", "expert worker", (),
    "Token rows of one call of the experts of a layer, over all routers that waited for it", CALL_SIZES,
)  # fmt: skip
SLOTS: Final = Series(
    "expertmesh_worker_slots", "gauge", "", "expert worker", (), "Experts that the worker has room for"
)
SLOTS_USED: Final = Series("expertmesh_worker_slots_used", "gauge", "", "expert worker", (), "Experts that it holds")
EXPERT_BYTES: Final = Series(
    "expertmesh_worker_expert_bytes", "gauge", "bytes", "expert worker", (), "Weights of the experts that it holds"
)
LOADED: Final = Series(
    "expertmesh_worker_loaded_experts_total",
    "counter",
    "",
    "expert worker",
    (),
    "Experts loaded, then and later",
)
LOAD: Final = Series(
    "expertmesh_worker_load_seconds_total", "counter", "seconds", "expert worker", (), "Time spent loading experts"
)
