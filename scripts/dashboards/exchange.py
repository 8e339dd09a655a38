"""*Exchange*: what it costs to have the experts in other processes."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from scripts.dashboards.parts import board, histogram, lines, quantiles, query


def _rate(series: str, by: str) -> str:
    return f"sum by ({by}) (rate({series}[$__rate_interval]))"


def _increase(series: str, by: str) -> str:
    return f"sum by ({by}) (increase({series}[$__rate_interval]))"


def exchange() -> Dashboard:
    """The dashboard."""
    time = [
        lines(
            "One layer's exchange", "From its dispatch to the sum of the experts' rows.",
            quantiles("expertmesh_exchange_seconds"), "s",
        ),
        histogram("Exchanges by their time", "Each layer of each step.", "expertmesh_exchange_seconds", "s"),
        lines(
            "Where the time goes", "Seconds a second of the routers' step loops; computing is the workers' own word.",
            [
                query("sum(rate(expertmesh_exchange_split_seconds_total[$__rate_interval]))", "sort rows by worker"),
                query("sum(rate(expertmesh_exchange_dispatch_seconds_total[$__rate_interval]))", "send"),
                query("sum(rate(expertmesh_exchange_wait_seconds_total[$__rate_interval]))", "wait"),
                query("sum(rate(expertmesh_exchange_combine_seconds_total[$__rate_interval]))", "sum up"),
                query("sum(rate(expertmesh_exchange_compute_seconds_total[$__rate_interval]))", "workers compute"),
            ], "percentunit",
        ),
        lines(
            "Waiting by worker", "One worker after the other: the first one's time covers the others'.",
            [query(_rate("expertmesh_exchange_wait_seconds_total", "worker"), "{{worker}}")], "percentunit",
        ),
        lines(
            "Computing by worker", "As workers say in their replies.",
            [query(_rate("expertmesh_exchange_compute_seconds_total", "worker"), "{{worker}}")], "percentunit",
        ),
        lines(
            "Sending by worker", "Time of dispatch.",
            [query(_rate("expertmesh_exchange_dispatch_seconds_total", "worker"), "{{worker}}")], "percentunit",
        ),
    ]  # fmt: skip
    traffic = [
        lines(
            "Rows by transport", "Bytes there and back.",
            [
                query(_rate("expertmesh_exchange_sent_bytes_total", "transport"), "{{transport}} there"),
                query(_rate("expertmesh_exchange_received_bytes_total", "transport"), "{{transport}} back"),
            ], "Bps", stacked=True,
        ),
        lines(
            "Rows by worker", "Bytes there and back.",
            [
                query(_rate("expertmesh_exchange_sent_bytes_total", "worker"), "{{worker}} there"),
                query(_rate("expertmesh_exchange_received_bytes_total", "worker"), "{{worker}} back"),
            ], "Bps",
        ),
        lines(
            "Requests by worker", "Parts of dispatches, those after a loss included.",
            [query(_rate("expertmesh_exchange_requests_total", "worker"), "{{worker}}")], "reqps",
        ),
        lines(
            "Rows of one call", "Of the experts of a layer, over all routers that waited for them: computed at once.",
            quantiles("expertmesh_worker_call_tokens"),
        ),
        histogram(
            "Calls by their rows", "Few rows: weights are read for little.", "expertmesh_worker_call_tokens", "short",
        ),
        lines(
            "Captured steps", "Steps through device memory, captured whole, and those that were computed again.",
            [
                query("sum(rate(expertmesh_captured_steps_total[$__rate_interval]))", "captured"),
                query("sum(rate(expertmesh_void_steps_total[$__rate_interval]))", "void"),
            ], "ops",
        ),
    ]  # fmt: skip
    losses = [
        lines(
            "Sent again", "Parts of dispatches whose reply was lost or late, by the worker that lost them.",
            [query(_increase("expertmesh_exchange_retries_total", "worker"), "{{worker}}")],
        ),
        lines(
            "Deadlines missed", "Replies that did not come in time.",
            [query(_increase("expertmesh_exchange_deadlines_missed_total", "worker"), "{{worker}}")],
        ),
        lines(
            "Asked elsewhere", "Parts of dispatches that another replica was asked for before the deadline.",
            [query(_increase("expertmesh_exchange_hedges_total", "worker"), "{{worker}}")],
        ),
        lines(
            "Replies dropped", "Nobody awaited them any more.",
            [query(_increase("expertmesh_exchange_fenced_replies_total", "router"), "{{router}}")],
        ),
        lines(
            "Steps that stand still", "Time from a loss to the reply that made up for it.",
            [query(_rate("expertmesh_exchange_repair_seconds_total", "router"), "{{router}}")], "percentunit",
        ),
        lines(
            "Workers passed over", "By routers, where another replica can take the rows.",
            [query("sum by (worker) (expertmesh_exchange_worker_ejected)", "{{worker}}")],
        ),
    ]  # fmt: skip
    return board(
        "exchange", "Exchange", "What it costs to have the experts in other processes.",
        (("Time", time), ("Traffic", traffic), ("Losses", losses)),
    )  # fmt: skip
