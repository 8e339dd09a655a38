"""*Fleet and faults*: which processes there are, how they do, and what failed."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from scripts.dashboards.parts import board, lines, number, query, states


def fleet() -> Dashboard:
    """The dashboard."""
    now = [
        number(
            f"{role.capitalize()} processes missing", "Wanted less ready.",
            f'sum(expertmesh_fleet_wanted{{role="{role}"}}) - sum(expertmesh_fleet_ready{{role="{role}"}})',
            limits=((1, "red"),),
        )
        for role in ("gateway", "router", "expert")
    ]  # fmt: skip
    now += [
        number(
            "Experts without a replica", "Requests wait for them.", "sum(expertmesh_experts_without_replica)",
            limits=((1, "red"),),
        ),
        number(
            "Sequences saved", "That went on at another router after theirs was lost, since start.",
            "sum(expertmesh_request_failovers_total)",
        ),
        number(
            "Placement acknowledged", "Whether every live router works with the placement in force.",
            "min(expertmesh_placement_acknowledged)", "bool_yes_no",
        ),
    ]  # fmt: skip
    processes = [
        states(
            "States", "Of every process.", "expertmesh_member_state", ("starting", "ready", "draining", "lost"),
        ),
        lines(
            "Ready and wanted", "Processes of each role.",
            [
                query("sum by (role) (expertmesh_fleet_ready)", "{{role}} ready"),
                query("sum by (role) (expertmesh_fleet_wanted)", "{{role}} wanted"),
            ],
        ),
        lines(
            "Restarts", "Times that a process came back as another one, since the controller started.",
            [query("sum by (process) (expertmesh_member_restarts_total)", "{{process}}")],
        ),
        lines(
            "Series scraped", "Whether the series of each process are part of the gateways' scrape.",
            [query("min by (process) (expertmesh_process_scraped)", "{{process}}")],
        ),
        lines(
            "Epochs", "The placement that each process works with: one that stays behind holds changes up.",
            [query("max by (process) (expertmesh_placement_epoch)", "{{process}}")], floor=None,
        ),
        lines(
            "Up for", "Since each process started.",
            [query("time() - max by (process) (expertmesh_process_start_time_seconds)", "{{process}}")], "s",
        ),
        lines(
            "Gateways' streams", "Routers that each gateway can send to.",
            [query("sum by (gateway) (expertmesh_gateway_router_connected)", "{{gateway}}")],
        ),
    ]  # fmt: skip
    resources = [
        lines(
            "Memory", "Resident, of each process.",
            [query("sum by (process) (expertmesh_process_resident_bytes)", "{{process}}")], "bytes",
        ),
        lines(
            "CPUs", "Busy cores of each process.",
            [query("sum by (process) (rate(expertmesh_process_cpu_seconds_total[$__rate_interval]))", "{{process}}")],
        ),
        lines(
            "Loading of experts", "Seconds a second.",
            [query("sum by (worker) (rate(expertmesh_worker_load_seconds_total[$__rate_interval]))", "{{worker}}")],
            "percentunit",
        ),
        lines(
            "GPUs computing", "Part of the last second, whoever uses them. Empty without GPUs.",
            [query("max by (process, gpu) (expertmesh_gpu_utilization_ratio)", "{{process}} {{gpu}}")], "percentunit",
        ),
        lines(
            "Memory of GPUs", "In use, whoever uses it. Empty without GPUs.",
            [query("max by (process, gpu) (expertmesh_gpu_memory_used_bytes)", "{{process}} {{gpu}}")], "bytes",
        ),
    ]  # fmt: skip
    faults = [
        lines(
            "Sequences that changed routers", "After theirs was lost.",
            [query("sum by (gateway) (increase(expertmesh_request_failovers_total[$__rate_interval]))", "{{gateway}}")],
        ),
        lines(
            "Rows sent again", "After a worker was lost or late.",
            [query("sum by (worker) (increase(expertmesh_exchange_retries_total[$__rate_interval]))", "{{worker}}")],
        ),
        lines(
            "Experts with too few replicas", "Of which no replica is ready, one, or fewer than are wanted.",
            [
                query("sum(expertmesh_experts_without_replica)", "no replica"),
                query("sum(expertmesh_experts_without_spare)", "one replica"),
                query("sum(expertmesh_experts_short_of_spares)", "fewer than wanted"),
            ],
        ),
    ]  # fmt: skip
    return board(
        "fleet", "Fleet and faults", "Which processes there are, how they do, and what failed.",
        (("Now", now), ("Processes", processes), ("Resources", resources), ("Faults", faults)),
    )  # fmt: skip
