"""Series of the routers: the step loop, and the exchange with the expert workers."""

from __future__ import annotations

from typing import Final

from cluster.observe.series.base import EXCHANGE_SECONDS, REQUEST_SECONDS, STEP_ROWS, STEP_SECONDS, Series

# The step loop.
RUNNING: Final = Series(
    "expertmesh_requests_running", "gauge", "", "router", (), "Sequences in the batch", vllm="vllm:num_requests_running"
)
WAITING: Final = Series(
    "expertmesh_requests_waiting", "gauge", "", "router", (), "Sequences that wait to be in the batch",
    vllm="vllm:num_requests_waiting",
)  # fmt: skip
PREEMPTIONS: Final = Series(
    "expertmesh_preemptions_total", "counter", "", "router", (), "Sequences that gave their KV cache back",
    vllm="vllm:num_preemptions_total",
)  # fmt: skip
KV_USAGE: Final = Series(
    "expertmesh_kv_cache_usage_ratio", "gauge", "ratio", "router", (), "Used part of the KV cache; 1: all of it",
    vllm="vllm:kv_cache_usage_perc",
)  # fmt: skip
KV_BLOCKS: Final = Series("expertmesh_kv_cache_blocks", "gauge", "", "router", (), "Blocks of the KV cache")
PREFIX_QUERIES: Final = Series(
    "expertmesh_prefix_cache_queries_total", "counter", "", "router", (), "Prompt tokens looked for in the KV cache",
    vllm="vllm:prefix_cache_queries_total",
)  # fmt: skip
PREFIX_HITS: Final = Series(
    "expertmesh_prefix_cache_hits_total", "counter", "", "router", (), "Prompt tokens found in the KV cache",
    vllm="vllm:prefix_cache_hits_total",
)  # fmt: skip
STEP: Final = Series(
    "expertmesh_step_seconds", "histogram", "seconds", "router", (), "One step: from its schedule to its tokens",
    STEP_SECONDS,
)  # fmt: skip
ROWS: Final = Series(
    "expertmesh_step_tokens", "histogram", "", "router", (),
    "Token rows of a step: prompts, decoding, and what is computed anew", STEP_ROWS,
    vllm="vllm:iteration_tokens_total",
)  # fmt: skip
EMITTED: Final = Series("expertmesh_sampled_tokens_total", "counter", "", "router", (), "Tokens drawn")
QUEUE: Final = Series(
    "expertmesh_request_queue_seconds", "histogram", "seconds", "router", (),
    "From a sequence's arrival at the router to its admission", REQUEST_SECONDS,
    vllm="vllm:request_queue_time_seconds",
)  # fmt: skip
PREFILL: Final = Series(
    "expertmesh_request_prefill_seconds", "histogram", "seconds", "router", (),
    "From a sequence's admission to its first token", REQUEST_SECONDS,
    vllm="vllm:request_prefill_time_seconds",
)  # fmt: skip
DECODE: Final = Series(
    "expertmesh_request_decode_seconds", "histogram", "seconds", "router", (),
    "From a sequence's first token to its last", REQUEST_SECONDS,
    vllm="vllm:request_decode_time_seconds",
)  # fmt: skip

# The exchange. Its counters of rows are of first sendings alone: what is sent again after a loss is not counted again.
EXPERT_TOKENS: Final = Series(
    "expertmesh_expert_tokens_total", "counter", "", "router", ("layer", "expert"),
    "Token rows that the gate gave to the expert; in the last layer only rows whose logits are wanted",
)  # fmt: skip
WORKER_TOKENS: Final = Series(
    "expertmesh_worker_tokens_total", "counter", "", "router", ("layer", "worker"),
    "Token rows that went to experts of the worker; without series per expert, `layer` is `all`",
)  # fmt: skip
EXCHANGE: Final = Series(
    "expertmesh_exchange_seconds", "histogram", "seconds", "router", (),
    "One layer's exchange, from its dispatch to the sum of the experts' rows", EXCHANGE_SECONDS,
)  # fmt: skip
DISPATCH: Final = Series(
    "expertmesh_exchange_dispatch_seconds_total", "counter", "seconds", "router", ("worker", "transport"),
    "Time spent on sending rows",
)  # fmt: skip
WAIT: Final = Series(
    "expertmesh_exchange_wait_seconds_total", "counter", "seconds", "router", ("worker", "transport"),
    "Time spent waiting for rows, one worker after the other: the first one's covers the others'",
)  # fmt: skip
COMPUTE: Final = Series(
    "expertmesh_exchange_compute_seconds_total", "counter", "seconds", "router", ("worker", "transport"),
    "Time that the worker computed for this router, as it says in its replies",
)  # fmt: skip
SPLIT: Final = Series(
    "expertmesh_exchange_split_seconds_total",
    "counter",
    "seconds",
    "router",
    (),
    "Time spent sorting rows by worker",
)
COMBINE: Final = Series(
    "expertmesh_exchange_combine_seconds_total", "counter", "seconds", "router", (), "Time spent on summing rows up"
)
SENT: Final = Series(
    "expertmesh_exchange_sent_bytes_total", "counter", "bytes", "router", ("worker", "transport"), "Rows sent"
)
RECEIVED: Final = Series(
    "expertmesh_exchange_received_bytes_total", "counter", "bytes", "router", ("worker", "transport"), "Rows received"
)
REQUESTS: Final = Series(
    "expertmesh_exchange_requests_total", "counter", "", "router", ("worker", "transport"),
    "Requests sent, those after a loss included",
)  # fmt: skip
RETRIES: Final = Series(
    "expertmesh_exchange_retries_total", "counter", "", "router", ("worker",),
    "Parts of a dispatch that were sent again, by the worker that lost them",
)  # fmt: skip
DEADLINES: Final = Series(
    "expertmesh_exchange_deadlines_missed_total", "counter", "", "router", ("worker",),
    "Replies that did not come in time, of experts without another replica",
)  # fmt: skip
HEDGES: Final = Series(
    "expertmesh_exchange_hedges_total", "counter", "", "router", ("worker",),
    "Replies that took longer than such replies do, so that another replica was asked",
)  # fmt: skip
FENCED: Final = Series(
    "expertmesh_exchange_fenced_replies_total", "counter", "", "router", (),
    "Replies that were dropped because nobody awaited them any more",
)  # fmt: skip
REPAIR: Final = Series(
    "expertmesh_exchange_repair_seconds_total", "counter", "seconds", "router", (),
    "Time in which steps stood still, from a loss to the reply that made up for it",
)  # fmt: skip
EJECTED: Final = Series(
    "expertmesh_exchange_worker_ejected", "gauge", "", "router", ("worker",),
    "Whether the worker is passed over where another replica can take its rows: 1 or 0",
)  # fmt: skip
CAPTURED: Final = Series(
    "expertmesh_captured_steps_total", "counter", "", "router", (), "Steps through device memory, captured whole"
)
VOID: Final = Series(
    "expertmesh_void_steps_total", "counter", "", "router", (), "Captured steps that were computed again"
)
