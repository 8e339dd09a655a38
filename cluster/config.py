"""The one configuration tree. Command line, YAML file and environment all read these fields, under these names.

A field `reply_timeout_s` is `--reply-timeout-s` on the command line, `reply_timeout_s:` in the YAML file and
`EXPERTMESH_REPLY_TIMEOUT_S` in the environment. Nearest wins: command line, environment, file, default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


def option(default: Any, help: str) -> Any:
    """A field of the configuration with the sentence that `--help` and `expertmesh config` show."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class Config:
    """The effective configuration of one cluster."""

    model: str = option("default", "`default`, a checkpoint directory, or a hub id")
    served_model_name: str | None = option(None, "name in the API; default: the directory's or hub id's last part")
    host: str = option("127.0.0.1", "address the gateway listens on")
    port: int = option(8000, "port the gateway listens on")
    transport: Literal["grpc", "local"] = option("grpc", "how rows travel between router and experts")
    expert_workers: int = option(2, "number of expert worker processes")
    routers: int = option(1, "number of router processes")
    gateways: int = option(1, "number of gateway processes")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "compute dtype; auto: float32 on CPU, bfloat16 on GPU"
    )
    router_threads: int = option(0, "CPU threads of a router; 0: an even share of the cores")
    worker_threads: int = option(0, "CPU threads of an expert worker; 0: an even share of the cores")
    kv_cache_mb: int = option(512, "KV cache of each router, MiB")
    block_size: int = option(16, "tokens per KV block")
    max_context: int = option(0, "longest prompt + answer in tokens; 0: what the model allows")
    max_batch_tokens: int = option(512, "most token rows in one step; longer prompts are prefilled in chunks")
    max_sequences: int = option(64, "most sequences in one step of one router")
    max_queue: int = option(256, "most requests waiting at one router; one more gets 429")
    reply_timeout_s: float = option(10.0, "a reply of an expert worker later than this is asked for again")
    rejoin_timeout_s: float = option(120.0, "how long a step waits for an expert that has no live replica")
    max_body_bytes: int = option(8 * 1024 * 1024, "largest request body; a larger one gets 413")
    api_keys_file: Path | None = option(None, "file with one API key per line; without it no key is asked for")
    allow_no_keys: bool = option(False, "listen beyond loopback without API keys")
    drain_timeout_s: float = option(30.0, "how long open requests may finish when the cluster stops")
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "log level of every process")
