"""*Expert balance*: which experts are hot, whether the workers are even, what the last rebalance achieved."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from scripts.dashboards.parts import bars, board, lines, matrix, number, query, rebalances

_ROWS = "sum by (layer, expert) (expertmesh_expert_window_tokens)"
_LAYER = "on (layer) group_left ()"
_LOAD = f"{_ROWS} / {_LAYER} (avg by (layer) ({_ROWS}) > 0)"
_SHARE = f"{_ROWS} / {_LAYER} (sum by (layer) ({_ROWS}) > 0)"
_BY_WORKER = "sum by (layer, worker) (rate(expertmesh_worker_tokens_total[$__rate_interval]))"


def balance() -> Dashboard:
    """The dashboard."""
    now = [
        number(
            "Imbalance of the workers", "Most over mean rows of the workers in 60 s: 1 is perfect. The same number as "
            "on the live page, in `expertmesh status` and in receipts.", "max(expertmesh_imbalance_ratio)",
            limits=((1.2, "yellow"), (1.5, "red")),
        ),
        number(
            "Imbalance of the worst layer's experts", "Most over mean rows of the experts of a layer: how skewed the "
            "model's choices are, before replicas and shares make up for it.", "max(expertmesh_layer_imbalance_ratio)",
        ),
        number(
            "Evenness of the experts", "Entropy of the experts' shares of a layer by its largest value, mean of the "
            "layers: 1 where all experts get the same.",
            f"avg(-sum by (layer) (({_SHARE}) * ln(({_SHARE}) > 0)) / ln(count by (layer) ({_SHARE}) > 1))",
            "percentunit",
        ),
        number(
            "Variation of the workers", "Standard deviation over mean of the workers' rows in 60 s.",
            "max(stddev by (cluster) (expertmesh_worker_window_tokens) "
            "/ (avg by (cluster) (expertmesh_worker_window_tokens) > 0))",
            "percentunit",
        ),
        number(
            "Experts without a spare", "Experts of which one replica is ready: losing its worker stops requests until "
            "it is loaded again.", "sum(expertmesh_experts_without_spare)",
        ),
        number(
            "Last rebalance", "When one succeeded last.",
            "max(expertmesh_rebalance_last_success_timestamp_seconds > 0) * 1000", "dateTimeFromNow",
        ),
    ]  # fmt: skip
    experts = [
        matrix(
            "Load of every expert", "Rows of an expert for the mean of its layer, in 60 s; rows are layers, columns "
            "experts.", _LOAD,
        ),
        matrix(
            "Replicas of every expert", "On workers that are ready. What is hot should have more.",
            "max by (layer, expert) (expertmesh_expert_replicas)",
        ),
        bars(
            "Hottest experts", "The ten with the most rows for the mean of their layer, in 60 s.",
            f"topk(10, {_LOAD})", "layer {{layer}}, expert {{expert}}",
        ),
        bars(
            "Imbalance of each layer's experts", "Most over mean; the ten worst layers.",
            "topk(10, max by (layer) (expertmesh_layer_imbalance_ratio))", "layer {{layer}}",
        ),
        bars(
            "Imbalance of the workers in each layer", "Most over mean of the workers' rows; a step waits for the most. "
            "The ten worst layers.",
            f"topk(10, max by (layer) ({_BY_WORKER}) / (avg by (layer) ({_BY_WORKER}) > 0))",
            "layer {{layer}}",
        ),
    ]  # fmt: skip
    workers = [
        lines(
            "Rows of the workers", "Token rows a second, all layers.",
            [query("sum by (worker) (rate(expertmesh_worker_tokens_total[$__rate_interval]))", "{{worker}}")], "cps",
        ),
        lines(
            "Load of the workers in the window", "What imbalance is computed from.",
            [query("sum by (worker) (expertmesh_worker_window_tokens)", "{{worker}}")],
        ),
        lines(
            "Imbalance over time", "Marks are rebalances that succeeded.",
            [
                query("max by (cluster) (expertmesh_imbalance_ratio)", "workers {{cluster}}"),
                query("max by (cluster) (expertmesh_layer_imbalance_ratio)", "experts of the worst layer {{cluster}}"),
            ], floor=1,
        ),
        lines(
            "Slots of the workers", "Experts held, and room for experts.",
            [
                query("sum by (worker) (expertmesh_worker_slots_used)", "{{worker}} held"),
                query("sum by (worker) (expertmesh_worker_slots > 0)", "{{worker}} room"),
            ],
        ),
        lines(
            "Memory of experts", "Weights of the experts that each worker holds.",
            [query("sum by (worker) (expertmesh_worker_expert_bytes)", "{{worker}}")], "bytes",
        ),
        lines(
            "Computing", "Part of the time in which each worker computes.",
            [query("sum by (worker) (rate(expertmesh_worker_compute_seconds_total[$__rate_interval]))", "{{worker}}")],
            "percentunit",
        ),
    ]  # fmt: skip
    actions = [
        lines(
            "Gain of the last rebalance", "Forecast: the part of the experts' time it was to save. Realised: how much "
            "lower the imbalance has been since.",
            [
                query("max by (cluster) (expertmesh_rebalance_forecast_gain_ratio)", "forecast {{cluster}}"),
                query("max by (cluster) (expertmesh_rebalance_realized_gain_ratio)", "realised {{cluster}}"),
            ], "percentunit", floor=None,
        ),
        lines(
            "Changes of the placement", "Since start, by what was asked for and whether it was done.",
            [query("sum by (action, result) (expertmesh_placement_actions_total)", "{{action}}, {{result}}")],
        ),
        lines(
            "Weights moved", "Bytes that workers loaded for changes, since start.",
            [query("sum by (action) (expertmesh_placement_moved_bytes_total)", "{{action}}")], "bytes",
        ),
    ]  # fmt: skip
    return board(
        "balance", "Expert balance", "Which experts are hot, whether the workers are even, and what was done about it.",
        (("Now", now), ("Experts", experts), ("Workers", workers), ("Rebalancing", actions)), [rebalances()],
    )  # fmt: skip
