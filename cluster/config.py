"""The one configuration tree. Command line, YAML file and environment all read these fields, under these names.

A field `reply_timeout_s` is `--reply-timeout-s` on the command line, `reply_timeout_s:` in the YAML file and
`EXPERTMESH_REPLY_TIMEOUT_S` in the environment. Nearest wins: command line, environment, file, default
(`cluster.config_load`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


def option(default: Any, help: str, *, at_least: float | None = None, at_most: float | None = None) -> Any:
    """A field of the configuration: the sentence that `--help` shows, and the bounds that loading enforces."""
    return field(default=default, metadata={"help": help, "at_least": at_least, "at_most": at_most})


@dataclass(frozen=True, slots=True)
class Config:
    """The effective configuration of one cluster."""

    model: str = option("default", "`default`, a checkpoint directory, or a hub id")
    served_model_name: str | None = option(None, "name in the API; default: the directory's or hub id's last part")
    host: str = option("127.0.0.1", "address the gateway listens on")
    port: int = option(8000, "port the gateway listens on", at_least=1, at_most=65535)
    transport: Literal["auto", "local", "device", "shm", "grpc", "collective"] = option(
        "auto",
        "how rows travel between routers and experts; local: one router holds them all; device, shm: through memory "
        "of GPUs or processes of one host, else gRPC; auto: local without expert workers, device for GPUs, else shm",
    )
    collective_interface: str | None = option(
        None, "network interface, or an address of it, for the collective transport; default: loopback"
    )
    collective_deadline_s: float = option(
        2.0, "a process of a collective group without a sign of life for this long is lost", at_least=0.1
    )
    tls_cert: Path | None = option(  # noqa: RUF009
        None, "PEM certificate of this cluster's processes, for the name `expertmesh`: they encrypt and know each other"
    )
    tls_key: Path | None = option(None, "PEM key of --tls-cert")  # noqa: RUF009
    tls_ca: Path | None = option(None, "PEM certificate of the authority that issued --tls-cert")  # noqa: RUF009
    trusted_network: bool = option(
        False,
        "let processes talk without TLS where others reach them; the collective transport always does",
    )
    expert_workers: int | None = option(
        None,
        "number of expert worker processes; 0: the router holds the experts itself; default: 2 on CPUs, "
        "on GPUs one for each that no router has, with a single GPU 0",
        at_least=0,
    )
    routers: int = option(1, "number of router processes", at_least=1)
    gateways: int = option(1, "number of gateway processes", at_least=1)
    generation_defaults: bool = option(
        True, "take what a request leaves open (temperature, top_p, ...) from the checkpoint's generation_config.json"
    )
    router_device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "what routers compute on; auto: a GPU if there is one"
    )
    expert_device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "what expert workers compute on; auto: a GPU if there is one"
    )
    expert_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8", "fp8-rows"] = option(
        "auto",
        "what experts' weights are kept in; auto: as they are stored, if they can be computed with so; on GPUs fp8: "
        "e4m3, made when they are loaded; fp8-rows: the rows they are multiplied with too",
    )
    gpus_per_router: float = option(
        0.0, "share of a GPU of each router; 0: a whole one, less where there are too few", at_least=0, at_most=1
    )
    gpus_per_expert_worker: float = option(
        0.0, "share of a GPU of each expert worker; 0: a whole one, less where there are too few", at_least=0, at_most=1
    )
    require_node_roles: bool = option(
        False,
        "start routers and expert workers only on Ray nodes with the custom resources expertmesh_router and "
        "expertmesh_expert; without, those are used where a node has them",
    )
    cpus_per_router: float = option(0.0, "CPUs that Ray sets aside for each router", at_least=0)
    cpus_per_expert_worker: float = option(0.0, "CPUs that Ray sets aside for each expert worker", at_least=0)
    admin_host: str = option("", "address of the admin API, on Ray's head node; default: the one that Ray uses")
    admin_token_file: Path | None = option(  # noqa: RUF009
        None, "file with the token that the admin API asks for; default: a new one, in the run directory"
    )
    admin_port: int = option(
        0,
        "port of the admin API (placement, scaling, receipts); 0: any free one",
        at_least=0,
        at_most=65535,
    )
    rebalance: Literal["off", "advise", "auto"] = option(
        "off",
        "move and replicate experts by their load; advise: only say what it would do",
    )
    spare_replicas: int = option(
        0,
        "further replicas of every expert, each on another worker: no loss of so many workers waits for a load",
        at_least=0,
    )
    rebalance_interval_s: float = option(30.0, "between two looks of the rebalancer at the load", at_least=0.1)
    rebalance_horizon_s: float = option(
        600.0, "a move has to save more of the experts' time within this than loading takes", at_least=1
    )
    rebalance_min_gain: float = option(0.05, "part of the experts' time that a move has to save", at_least=0, at_most=1)
    autoscale: Literal["off", "advise", "auto"] = option(
        "off", "start and end routers and expert workers by their load; advise: only say what it would do"
    )
    min_routers: int = option(1, "fewest routers that the autoscaler leaves", at_least=1)
    max_routers: int = option(0, "most routers that the autoscaler has; 0: as many as at the start", at_least=0)
    min_expert_workers: int = option(1, "fewest expert workers that the autoscaler leaves", at_least=1)
    max_expert_workers: int = option(
        0, "most expert workers that the autoscaler has; 0: as many as at the start", at_least=0
    )
    autoscale_interval_s: float = option(5.0, "between two looks of the autoscaler at the load", at_least=0.1)
    autoscale_window_s: float = option(30.0, "over which the load is averaged before there are more", at_least=0.1)
    autoscale_idle_s: float = option(300.0, "for which one less would have been enough before it ends", at_least=0.1)
    autoscale_cooldown_s: float = option(60.0, "between two changes of the number of routers, or workers", at_least=0)
    autoscale_queue: float = option(4.0, "sequences that may wait at a router before there are more", at_least=0.1)
    autoscale_kv_use: float = option(
        0.8,
        "part of a router's KV cache, and of --max-sequences, used before there are more",
        at_least=0.05,
        at_most=1,
    )
    autoscale_worker_use: float = option(
        0.7, "part of the time in which an expert worker computes before there are more", at_least=0.05, at_most=1
    )
    autoscale_worker_waiting: float = option(
        1.0, "requests that wait at an expert worker, on average, before there are more", at_least=0.01
    )
    expert_slots: int = option(
        0,
        "experts that each expert worker has room for, over all layers; 0: what its GPU holds, on a CPU half more than "
        "an equal share of all replicas",
        at_least=0,
    )
    routing_trace: Path | None = option(  # noqa: RUF009
        None, "directory in which each router counts a sample of what its gates choose, for `placement plan --trace`"
    )
    routing_trace_sample: float = option(
        0.01, "share of the steps that --routing-trace counts", at_least=0.0001, at_most=1
    )
    weights: Literal["storage", "peer", "auto"] = option(
        "auto",
        "where a worker gets an expert from that is moved to it; peer: a worker that holds it, else the model's files; "
        "auto: the files, a peer where they cannot be read",
    )
    gpu_memory_utilization: float = option(
        0.9, "share of a GPU's memory that is taken: what weights leave of it is KV cache", at_least=0.05, at_most=1.0
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "compute dtype of routers and expert workers; auto: the checkpoint's on a GPU, float32 on a CPU"
    )
    check_weights: bool = option(True, "refuse weights that are NaN or infinite when they are loaded")
    router_threads: int = option(0, "CPU threads of a router; 0: an even share of the cores", at_least=0)
    worker_threads: int = option(0, "CPU threads of an expert worker; 0: a share of the cores", at_least=0)
    kv_cache_mb: int = option(0, "KV cache of each router, MiB; 0: what its GPU has left, 512 on a CPU", at_least=0)
    block_size: int = option(16, "tokens per KV block", at_least=1, at_most=4096)
    prefix_cache: bool = option(True, "share the KV cache of prompts that begin alike")
    max_context: int = option(0, "longest prompt + answer in tokens; 0: what the model allows", at_least=0)
    max_batch_tokens: int = option(
        512, "most token rows in one step; longer prompts are prefilled in chunks", at_least=1
    )
    max_sequences: int = option(64, "most sequences in one step of one router", at_least=1)
    max_queue: int = option(256, "most requests waiting at one router; one more gets 429", at_least=1)
    max_queue_wait_s: float = option(
        30.0,
        "a request that would wait longer at its router gets 429 at once, one that did when it is over",
        at_least=1,
    )
    reply_timeout_s: float = option(
        10.0, "a reply of an expert worker later than this is asked for again", at_least=0.01
    )
    rejoin_timeout_s: float = option(
        120.0, "how long a step waits for an expert that has no live replica", at_least=0.01
    )
    tool_call_parser: Literal["mistral", "hermes", "llama3_json"] | None = option(
        None, "how the model writes function calls; default: what its chat template teaches"
    )
    strict_fields: bool = option(False, "refuse requests with fields that are not known instead of ignoring those")
    max_body_bytes: int = option(8 * 1024 * 1024, "largest request body; a larger one gets 413", at_least=1024)
    max_connections_per_address: int = option(
        4096, "connections that one client's address may have open; 0: any number", at_least=0, at_most=1_000_000
    )
    api_keys_file: Path | None = option(  # noqa: RUF009
        None, "file with one API key per line, and what each may ask for; without it no key is asked for"
    )
    allowed_hosts: str = option("", "names, by commas, that a gateway on loopback without keys may be called by")
    cors_origins: str = option("", "origins, by commas, whose pages may call the gateway from a browser; *: any")
    root_path: str = option("", "path under which a proxy in front shows the gateway")
    live_page: bool = option(True, "show the cluster at `/`: experts, workers, events, a chat")
    trust_request_chat_template: bool = option(
        False, "take chat templates that come with requests; they run in a process of their own, with limits"
    )
    info_endpoints: bool = option(False, "serve /server_info and /tokenizer_info, which show the configuration")
    allow_no_keys: bool = option(False, "listen beyond loopback without API keys")
    drain_timeout_s: float = option(30.0, "how long open requests may finish when the cluster stops", at_least=0)
    ray_address: str | None = option(None, "running Ray cluster to join; default: RAY_ADDRESS, else start Ray here")
    state_dir: Path | None = option(  # noqa: RUF009
        None, "directory for caches, models, Ray's token and the notes of running clusters; default: where XDG has them"
    )
    metrics_port: int = option(
        0,
        "port of a process's own metrics, /health and /ready; those of one machine take it and the next ones; 0: any",
        at_least=0,
        at_most=65000,
    )
    per_expert_metrics: Literal["auto", "on", "off"] = option(
        "auto", "series for each expert of each layer; auto: of models that have at most 4096"
    )
    vllm_metrics: bool = option(False, "also show vLLM's names of the series that vLLM has")
    cluster_name: str | None = option(
        None, "label `cluster` that Prometheus discovers; default: host name and port of the gateway"
    )
    prometheus: bool = option(False, "start the Prometheus that is installed here, on all processes of the cluster")
    allow_chaos: bool = option(
        False,
        "let `expertmesh chaos` kill, stop, slow and cut off processes; routers reach workers through a proxy",
    )
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "log level of every process")
    log_format: Literal["text", "json"] = option(
        "text", "of log lines; json: each event one line, with its request's id"
    )
    otlp_traces_endpoint: str | None = option(
        None, "OpenTelemetry collector that gets traces, http://HOST:4318/v1/traces; default: nothing is traced"
    )
