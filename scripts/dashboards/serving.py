"""*Serving*: what clients see, and what the schedulers do. What vLLM's own dashboard has, and more."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from scripts.dashboards.parts import board, histogram, lines, quantiles, query


def serving() -> Dashboard:
    """The dashboard."""
    latency = [
        lines(
            "Time to first token", "From the start of a sequence to its first token.",
            quantiles("expertmesh_time_to_first_token_seconds"), "s",
        ),
        lines(
            "Inter-token latency", "Between two outputs of a sequence after its first.",
            quantiles("expertmesh_inter_token_latency_seconds"), "s",
        ),
        lines(
            "Time per output token", "Mean of a sequence's tokens after its first.",
            quantiles("expertmesh_request_time_per_output_token_seconds"), "s",
        ),
        lines("End to end", "From the start of a sequence to its end.", quantiles("expertmesh_request_seconds"), "s"),
        lines(
            "Queue", "From a sequence's arrival at the router to its admission.",
            quantiles("expertmesh_request_queue_seconds"), "s",
        ),
        lines(
            "Prefill and decode", "Means: from admission to the first token, and from there to the last.",
            [
                query(
                    f"sum(rate(expertmesh_request_{part}_seconds_sum[$__rate_interval])) "
                    f"/ sum(rate(expertmesh_request_{part}_seconds_count[$__rate_interval]))", part,
                )
                for part in ("prefill", "decode")
            ], "s",
        ),
    ]  # fmt: skip
    throughput = [
        lines(
            "Tokens", "Of prompts, and generated for clients.",
            [
                query("sum(rate(expertmesh_prompt_tokens_total[$__rate_interval]))", "prompts"),
                query("sum(rate(expertmesh_generation_tokens_total[$__rate_interval]))", "generated"),
            ], "cps",
        ),
        lines(
            "Sequences", "In the batch, and waiting to be in it.",
            [
                query("sum(expertmesh_requests_running)", "running"),
                query("sum(expertmesh_requests_waiting)", "waiting"),
                query("sum(expertmesh_requests_unplaced)", "without a router"),
            ],
        ),
        lines(
            "Use of the KV cache", "1: all of it.",
            [query("max by (router) (expertmesh_kv_cache_usage_ratio)", "{{router}}")], "percentunit",
        ),
        lines(
            "Prompt tokens found in the cache", "Part of those looked for.",
            [
                query(
                    "sum(rate(expertmesh_prefix_cache_hits_total[$__rate_interval])) "
                    "/ sum(rate(expertmesh_prefix_cache_queries_total[$__rate_interval]))", "hit rate",
                )
            ], "percentunit",
        ),
        lines(
            "Steps", "From the schedule of a step to its tokens.", quantiles("expertmesh_step_seconds"), "s",
        ),
        lines(
            "Rows of a step", "Prompts, decoding, and what is computed anew.", quantiles("expertmesh_step_tokens"),
        ),
    ]  # fmt: skip
    requests = [
        histogram("Prompts by their length", "Tokens.", "expertmesh_request_prompt_tokens", "short"),
        histogram("Answers by their length", "Tokens.", "expertmesh_request_generation_tokens", "short"),
        lines(
            "How sequences end", "abort: the client left.",
            [query("sum by (reason) (increase(expertmesh_requests_finished_total[$__rate_interval]))", "{{reason}}")],
            stacked=True,
        ),
        lines(
            "HTTP requests", "By status; 499: the client left.",
            [query("sum by (status) (rate(expertmesh_http_requests_total[$__rate_interval]))", "{{status}}")], "reqps",
            stacked=True,
        ),
        lines(
            "HTTP requests by route", "All of them.",
            [query("sum by (route) (rate(expertmesh_http_requests_total[$__rate_interval]))", "{{route}}")], "reqps",
        ),
        lines(
            "Refused", "By the code in the error.",
            [query("sum by (reason) (increase(expertmesh_requests_rejected_total[$__rate_interval]))", "{{reason}}")],
        ),
        lines(
            "Preempted", "Sequences that gave their KV cache back.",
            [query("sum by (router) (increase(expertmesh_preemptions_total[$__rate_interval]))", "{{router}}")],
        ),
    ]  # fmt: skip
    return board(
        "serving", "Serving", "What clients see, and what the schedulers do.",
        (("Latency", latency), ("Throughput", throughput), ("Requests", requests)),
    )  # fmt: skip
