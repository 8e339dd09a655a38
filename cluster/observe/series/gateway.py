"""Series of the gateways: requests as clients see them."""

from __future__ import annotations

from typing import Final

from cluster.observe.series.base import FIRST_TOKEN_SECONDS, NEXT_TOKEN_SECONDS, REQUEST_SECONDS, TOKENS, Series

HTTP_REQUESTS: Final = Series(
    "expertmesh_http_requests_total", "counter", "", "gateway", ("route", "status"),
    "HTTP requests by route and status; 499: the client left",
)  # fmt: skip
REJECTED: Final = Series(
    "expertmesh_requests_rejected_total", "counter", "", "gateway", ("reason",),
    "HTTP requests that were refused, by the code in their error (queue_full, invalid_api_key, ...)",
)  # fmt: skip
FINISHED: Final = Series(
    "expertmesh_requests_finished_total", "counter", "", "gateway", ("reason",),
    "Sequences that ended: stop, length, error, or abort: the client left",
    vllm="vllm:request_success_total",
)  # fmt: skip
OPEN: Final = Series(
    "expertmesh_requests_open", "gauge", "", "gateway", (), "Sequences being generated or waiting for it"
)
UNPLACED: Final = Series(
    "expertmesh_requests_unplaced", "gauge", "", "gateway", (), "Open sequences that wait for a router, having none"
)
FAIL_OVERS: Final = Series(
    "expertmesh_request_failovers_total", "counter", "", "gateway", (),
    "Sequences that went on at another router after theirs was lost",
)  # fmt: skip
ROUTER_CONNECTED: Final = Series(
    "expertmesh_gateway_router_connected", "gauge", "", "gateway", ("router",),
    "Whether the gateway's stream to the router stands and the router says that it is ready: 1 or 0",
)  # fmt: skip
PROMPT_TOKENS: Final = Series(
    "expertmesh_prompt_tokens_total", "counter", "", "gateway", (), "Prompt tokens of the sequences started",
    vllm="vllm:prompt_tokens_total",
)  # fmt: skip
GENERATION_TOKENS: Final = Series(
    "expertmesh_generation_tokens_total", "counter", "", "gateway", (), "Tokens generated for clients",
    vllm="vllm:generation_tokens_total",
)  # fmt: skip
FIRST_TOKEN: Final = Series(
    "expertmesh_time_to_first_token_seconds", "histogram", "seconds", "gateway", (),
    "From the start of a sequence to its first token", FIRST_TOKEN_SECONDS,
    vllm="vllm:time_to_first_token_seconds",
)  # fmt: skip
INTER_TOKEN: Final = Series(
    "expertmesh_inter_token_latency_seconds", "histogram", "seconds", "gateway", (),
    "Between two outputs of a sequence after its first", NEXT_TOKEN_SECONDS,
    vllm="vllm:inter_token_latency_seconds",
)  # fmt: skip
PER_OUTPUT_TOKEN: Final = Series(
    "expertmesh_request_time_per_output_token_seconds", "histogram", "seconds", "gateway", (),
    "Mean time of a sequence's tokens after its first", NEXT_TOKEN_SECONDS,
    vllm="vllm:request_time_per_output_token_seconds",
)  # fmt: skip
END_TO_END: Final = Series(
    "expertmesh_request_seconds", "histogram", "seconds", "gateway", (),
    "From the start of a sequence to its end, of those that ended by themselves", REQUEST_SECONDS,
    vllm="vllm:e2e_request_latency_seconds",
)  # fmt: skip
REQUEST_PROMPT_TOKENS: Final = Series(
    "expertmesh_request_prompt_tokens", "histogram", "", "gateway", (), "Prompt tokens of a sequence", TOKENS,
    vllm="vllm:request_prompt_tokens",
)  # fmt: skip
REQUEST_GENERATION_TOKENS: Final = Series(
    "expertmesh_request_generation_tokens", "histogram", "", "gateway", (), "Generated tokens of a sequence", TOKENS,
    vllm="vllm:request_generation_tokens",
)  # fmt: skip
SCRAPED: Final = Series(
    "expertmesh_process_scraped", "gauge", "", "gateway", ("process",),
    "Whether the series of the process are part of this scrape of the whole cluster: 1 or 0",
)  # fmt: skip
