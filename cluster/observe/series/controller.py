"""Series of the controller: the fleet, the placement, and what was done about it."""

from __future__ import annotations

from typing import Final

from cluster.observe.series.base import Series

# The fleet.
MEMBER_STATE: Final = Series(
    "expertmesh_member_state", "gauge", "", "controller", ("process", "role", "state"),
    "1 for the state that the process is in (starting, ready, draining, lost), 0 for the others",
)  # fmt: skip
RESTARTS: Final = Series(
    "expertmesh_member_restarts_total", "counter", "", "controller", ("process", "role"),
    "Times that the process came back as another one",
)  # fmt: skip
WANTED: Final = Series(
    "expertmesh_fleet_wanted", "gauge", "", "controller", ("role",), "How many processes of the role there are to be"
)
READY: Final = Series(
    "expertmesh_fleet_ready", "gauge", "", "controller", ("role",), "How many processes of the role are ready"
)

AUTOSCALE_TARGET: Final = Series(
    "expertmesh_autoscale_target", "gauge", "", "controller", ("role",),
    "How many processes of the role the autoscaler wants, whether it acts or advises",
)  # fmt: skip
AUTOSCALE_LOAD: Final = Series(
    "expertmesh_autoscale_load_ratio", "gauge", "ratio", "controller", ("role", "signal"),
    "What the autoscaler looks at, as a multiple of its target",
)  # fmt: skip

# The placement.
REPLICAS: Final = Series(
    "expertmesh_expert_replicas", "gauge", "", "controller", ("layer", "expert"), "Replicas on workers that are ready"
)
HOME: Final = Series(
    "expertmesh_expert_home_ratio", "gauge", "ratio", "controller", ("layer", "expert", "worker"),
    "The replica's share of its expert's rows",
)  # fmt: skip
EXPERTS: Final = Series("expertmesh_experts", "gauge", "", "controller", (), "Experts of all layers")
WITHOUT_REPLICA: Final = Series(
    "expertmesh_experts_without_replica", "gauge", "", "controller", (), "Experts of which no replica is ready"
)
WITHOUT_SPARE: Final = Series(
    "expertmesh_experts_without_spare", "gauge", "", "controller", (),
    "Experts of which exactly one replica is ready: its loss would stop the steps until it is loaded again",
)  # fmt: skip
SPARES_WANTED: Final = Series(
    "expertmesh_spare_replicas_wanted", "gauge", "", "controller", (),
    "Replicas that every expert is to have beside its first: `--spare-replicas`, or fewer if there are fewer workers",
)  # fmt: skip
SHORT_OF_SPARES: Final = Series(
    "expertmesh_experts_short_of_spares", "gauge", "", "controller", (),
    "Experts with a ready replica, and with fewer further ones than are wanted",
)  # fmt: skip
ACKNOWLEDGED: Final = Series(
    "expertmesh_placement_acknowledged", "gauge", "", "controller", (),
    "Whether every live router works with the placement in force: 1 or 0",
)  # fmt: skip
WORKER_WINDOW: Final = Series(
    "expertmesh_worker_window_tokens", "gauge", "", "controller", ("worker",),
    "Rows that the worker got, each counting exp(-age / 60 s): what imbalance is computed from",
)  # fmt: skip
EXPERT_WINDOW: Final = Series(
    "expertmesh_expert_window_tokens", "gauge", "", "controller", ("layer", "expert"),
    "Rows that the expert got, each counting exp(-age / 60 s)",
)  # fmt: skip
IMBALANCE: Final = Series(
    "expertmesh_imbalance_ratio", "gauge", "ratio", "controller", (),
    "Most over mean of the workers' rows in the window; 1 is perfect",
)  # fmt: skip
LAYER_IMBALANCE: Final = Series(
    "expertmesh_layer_imbalance_ratio", "gauge", "ratio", "controller", ("layer",),
    "Most over mean of the workers' rows of the layer in the window; 1 is perfect",
)  # fmt: skip

# What was done about it: `action` is rebalance, replicate, drop, move, apply, drain, scale, pin, ...
ACTIONS: Final = Series(
    "expertmesh_placement_actions_total", "counter", "", "controller", ("action", "result"),
    "Changes of the placement that were asked for, by result: done or failed",
)  # fmt: skip
ACTION_SECONDS: Final = Series(
    "expertmesh_placement_action_seconds_total", "counter", "seconds", "controller", ("action",), "Time they took"
)
MOVED_BYTES: Final = Series(
    "expertmesh_placement_moved_bytes_total", "counter", "bytes", "controller", ("action",),
    "Weights that workers loaded for them",
)  # fmt: skip
FORECAST_GAIN: Final = Series(
    "expertmesh_rebalance_forecast_gain_ratio", "gauge", "ratio", "controller", (),
    "Of the last rebalance: the part of the experts' time that it was to save",
)  # fmt: skip
REALIZED_GAIN: Final = Series(
    "expertmesh_rebalance_realized_gain_ratio", "gauge", "ratio", "controller", (),
    "Of the last rebalance: how much lower the imbalance has been since, as part of that before",
)  # fmt: skip
LAST_SUCCESS: Final = Series(
    "expertmesh_rebalance_last_success_timestamp_seconds", "gauge", "seconds", "controller", (),
    "When a rebalance last succeeded, in seconds since 1970; 0: never",
)  # fmt: skip
LAST_LOOK: Final = Series(
    "expertmesh_rebalance_last_look_timestamp_seconds", "gauge", "seconds", "controller", (),
    "When the rebalancer last looked at the load, in seconds since 1970; 0: never",
)  # fmt: skip
ACTING: Final = Series(
    "expertmesh_rebalance_acting_seconds", "gauge", "seconds", "controller", (),
    "How long the rebalancer has been carrying out its present action; 0: it has none",
)  # fmt: skip
FAILURES: Final = Series(
    "expertmesh_rebalance_failures", "gauge", "", "controller", (), "Actions of the rebalancer that failed in a row"
)
MODE: Final = Series(
    "expertmesh_rebalance_mode", "gauge", "", "controller", ("mode",), "1 for its mode: off, advise or auto"
)
