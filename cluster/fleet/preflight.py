"""What can be known before anything starts: is the port free, are checkpoint and keys whole, does memory suffice."""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from cluster.config import Config
from cluster.control.options import ProcessBytes
from cluster.errors import StartError
from cluster.fleet.choose import Choice, choose
from cluster.fleet.devices import Needs, Use, arrange, has_8_bits, kinds
from cluster.gateway.defaults import SamplingDefaults, read_defaults
from cluster.gateway.keys import ApiKeys
from cluster.gateway.tokenizer import Tokenizer
from cluster.gateway.vocabulary import check_rows
from cluster.observe.cardinality import per_expert
from cluster.router import memory
from cluster.router.build import dense_bytes
from cluster.router.sizing import cluster_dtype, context_limit, expert_bytes, pool_blocks, step_bytes
from workers import wire
from workers.checkpoint import Checkpoint
from workers.cores import available_cores
from workers.device import Gpu, gpus
from workers.kernels.threads import worker_threads
from workers.model.kv_cache import bytes_per_block
from workers.spec import ModelSpec
from workers.weights import FORMATS

_PROCESS_BYTES = 256 * 2**20  # Python, torch and gRPC in each of our processes
_RAY_BYTES = 1024 * 2**20  # Ray, Serve and the gateways
_GATEWAY_BYTES = 192 * 2**20
_STEP_BYTES = 256 * 2**20  # activations and logits of a router's step


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be started."""

    config: Config  # with every "auto" settled
    gpus: tuple[Gpu, ...]  # of all nodes
    uses: tuple[Use, ...]  # of GPUs
    transport: Choice
    checkpoint: str
    model_name: str
    n_layers: int
    n_experts: int  # of a layer that has any
    dense_layers: frozenset[int]  # the layers without
    vocab_size: int
    max_context: int  # tokens, prompt and answer together
    defaults: SamplingDefaults  # of what requests leave open
    workers: tuple[str, ...]  # ids of the expert workers; none with the local transport
    routers: tuple[str, ...]
    worker_threads: int
    router_threads: int
    memory: dict[str, int]  # bytes of the host's, by what they are for
    expert_bytes: int  # of one replica
    process_bytes: ProcessBytes
    load_bytes: int  # that all of them together read of the checkpoint


def plan(config: Config, checkpoint: Path, found: tuple[Gpu, ...] | None = None) -> Plan:
    """Look at the checkpoint and decide; `found`: the GPUs that there are, by default those of this machine.

    Raises CheckpointError naming file and tensor, StartError.
    """
    opened = Checkpoint(checkpoint)
    opened.verify()
    spec = opened.spec
    if not spec.experts:
        config = replace(config, expert_workers=0)
    found = gpus() if found is None else found
    config = kinds(config, found)
    dtype = cluster_dtype(config, spec)
    if spec.experts and config.max_batch_tokens > (most := wire.most_tokens(spec.hidden_size, spec.top_k, dtype)):
        raise StartError(f"--max-batch-tokens {config.max_batch_tokens}: rows of this model travel {most} at most")
    replica = expert_bytes(opened, dtype, config.expert_device, config.expert_dtype)
    n_replicas = len(spec.experts) * (1 + config.spare_replicas)
    experts = replica * n_replicas
    dense = dense_bytes(opened, dtype, config.router_device)
    block = bytes_per_block(spec, config.block_size, dtype)
    work = step_bytes(config, spec, dtype) if config.router_device == "cuda" else _STEP_BYTES
    in_8 = 0
    if config.expert_device == "cuda" and config.expert_dtype == "auto" and all(map(has_8_bits, found)):
        in_8 = n_replicas * FORMATS["fp8"].expert_bytes(spec.hidden_size, spec.ffn_size)
    needs = Needs(
        experts=experts, n_experts=spec.n_experts, dense=dense, work=work, kv_block=block,
        experts_8=in_8 if in_8 < experts else 0,
    )  # fmt: skip
    config, uses = arrange(config, found, needs)
    transport = choose(config, has_experts=bool(spec.experts), gpus=found)
    n_workers = config.expert_workers if config.expert_workers and transport.transport != "local" else 0
    check_spares(config, n_workers, n_replicas)
    n_blocks = pool_blocks(config, spec, dtype)
    wanted = {"processes": _PROCESS_BYTES * (config.routers + n_workers) + _RAY_BYTES}
    if (config.expert_device if n_workers else config.router_device) == "cpu":
        wanted["experts"] = experts
    if config.router_device == "cpu":
        wanted["dense weights"] = dense * config.routers
        wanted["KV caches"] = n_blocks * block * config.routers
        wanted["work"] = work * config.routers
    router_bytes = _PROCESS_BYTES
    if config.router_device == "cpu":
        router_bytes += dense + n_blocks * block + work
    own = config.ray_address is None  # all processes are of this machine
    cores = available_cores()
    return Plan(
        expert_bytes=replica,
        config=replace(
            config,
            transport=transport.transport,
            served_model_name=model_name(config, checkpoint),
            per_expert_metrics=_per_expert(config, spec),
            cluster_name=config.cluster_name or f"{socket.gethostname()}:{config.port}",
        ),
        gpus=found,
        uses=uses,
        transport=transport,
        checkpoint=str(checkpoint.resolve()),
        model_name=model_name(config, checkpoint),
        n_layers=spec.n_layers,
        n_experts=spec.n_experts,
        dense_layers=spec.dense_layers,
        vocab_size=spec.vocab_size,
        max_context=context_limit(config, spec, n_blocks),
        defaults=read_defaults(checkpoint) if config.generation_defaults else SamplingDefaults(),
        workers=tuple(f"expert-{i}" for i in range(n_workers)),
        routers=tuple(f"router-{i}" for i in range(config.routers)),
        # Routers and workers take turns within a step, so each pool gets all cores.
        worker_threads=config.worker_threads
        or int(config.cpus_per_expert_worker)
        or (worker_threads(cores, n_workers) if n_workers else 1),
        router_threads=config.router_threads or int(config.cpus_per_router) or max(1, cores // config.routers),
        memory=wanted,
        process_bytes=ProcessBytes(_PROCESS_BYTES, router_bytes, _GATEWAY_BYTES) if own else ProcessBytes(),
        load_bytes=opened.stored_bytes(routers=config.routers),
    )


def _per_expert(config: Config, spec: ModelSpec) -> Literal["on", "off"]:
    layers = spec.n_layers - len(spec.dense_layers)
    return "on" if per_expert(config.per_expert_metrics, layers, spec.n_experts) else "off"


def check_spares(config: Config, n_workers: int, n_replicas: int) -> None:
    """StartError unless so many workers can hold the replicas that `--spare-replicas` asks for."""
    if not config.spare_replicas:
        return
    if n_workers <= config.spare_replicas:
        raise StartError(
            f"--spare-replicas {config.spare_replicas} needs {config.spare_replicas + 1} expert workers or more; "
            f"there are {n_workers}"
        )
    if 0 < config.expert_slots * n_workers < n_replicas + n_workers:  # one slot each stays free for moves
        raise StartError(
            f"--spare-replicas {config.spare_replicas} makes {n_replicas} replicas, which need --expert-slots "
            f"{-(-n_replicas // n_workers) + 1} on {n_workers} expert workers"
        )


def model_name(config: Config, checkpoint: Path) -> str:
    """The model's name in the API."""
    if config.served_model_name is not None:
        return config.served_model_name
    if config.model == "default" or Path(config.model).is_dir():
        return checkpoint.resolve().name
    return config.model.rsplit("/", 1)[-1]


def check_gateway(config: Config, checkpoint: Path, vocab_size: int) -> str:
    """Read what only the gateways need; what to tell the user of it, or "".

    Raises CheckpointError naming the tokenizer's file, ConfigError on the keys.
    """
    tokenizer = Tokenizer(checkpoint)
    _ = tokenizer.chat_templates
    if config.api_keys_file is not None:
        ApiKeys.from_file(config.api_keys_file)
    return check_rows(tokenizer, vocab_size)


def check_memory(plan: Plan) -> None:
    """StartError unless what will be loaded fits into the memory of this machine."""
    memory.check_memory(plan.memory)


def check_port(host: str, port: int) -> None:
    """StartError unless something can listen on `host:port`; says who does, where the system tells."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise StartError(f"--host {host}: {error.strerror}") from error
    with socket.socket(family, kind, proto) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise StartError(f"cannot listen on {host}:{port}: {error.strerror}{_owner(port)}") from error


def _owner(port: int) -> str:
    try:
        for found in psutil.net_connections("tcp"):
            if found.status == psutil.CONN_LISTEN and found.laddr[1:2] == (port,) and found.pid:
                return f" (process {found.pid}, {psutil.Process(found.pid).name()})"
    except psutil.Error:
        pass  # another user's
    return ""
