"""Ray on this machine, for one cluster: loopback only, token authentication, gone with the process that started it.

Nothing here imports Ray before `environment` is in force: Ray reads most of its settings when it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from cluster.config import Config
from cluster.errors import StartError
from cluster.fleet import haproxy_exec, ray_logs
from cluster.fleet.open_files import most_clients
from cluster.fleet.ports import reserve_port
from cluster.fleet.ray_address import check_there
from cluster.fleet.ray_token import has_token
from workers.cores import available_cores

_OBJECT_STORE_BYTES = 80 * 1024 * 1024  # Ray's least; only control messages pass through it
_KILL_AFTER_S = 5.0
_LONGEST_STREAM_S = 3600
_PROCESSES = 1000  # of each kind that a node of our own takes: memory is the limit

FILES = ("haproxy",)  # in the run directory: by what HAProxy is started; its sockets come and go as it is replaced
LOGS = Path("session_latest", "logs")  # below the run directory
APPLICATION = "expertmesh"  # its name in Serve

_AUTH_HINT = "; does it ask for a token (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH) that this environment lacks?"

_QUIETLY: dict[str, Any] = {"namespace": "expertmesh", "log_to_driver": False, "logging_level": "ERROR"}
_COMMON = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a call after the end must not start another Ray
}

# What Ray and Serve do while nothing happens, for dashboards and an autoscaler that are not there: left alone it takes
# 15 % of a core. Values of the user's own environment count.
_QUIET = {
    "RAY_enable_metrics_collection": "0",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    "RAY_event_stats_print_interval_ms": "0",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "10000",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # the statistics of Ray's agent
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
}


def environment(config: Config, run_dir: Path, open_files: int) -> dict[str, str]:
    """Ray's and Serve's settings, to be in force before Ray is imported. Writes the HAProxy script into `run_dir`.

    `open_files`: how many files a process may have open.
    """
    if config.ray_address is not None:  # the rest is up to whoever runs that Ray
        # `ray start` asks for a token if there is one, and whoever joins says nothing unless told to.
        wants_token = has_token(os.environ) and "RAY_AUTH_MODE" not in os.environ
        return {**_COMMON, "RAY_AUTH_MODE": "token"} if wants_token else _COMMON
    haproxy = run_dir / "haproxy"
    haproxy_exec.install(haproxy, config.host, config.port, config.max_connections_per_address)
    return {
        **_COMMON,
        **{name: os.environ.get(name, value) for name, value in _QUIET.items()},
        # Under this name Ray knows the setting that makes a node's address 127.0.0.1: all its servers bind to that.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Ray's own default, 15, is for batches that run beside other work.
        "RAY_worker_niceness": os.environ.get("RAY_worker_niceness", "0"),  # noqa: SIM112 (Ray calls it so)
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        # Without its head Ray starts nothing, but what runs goes on; its own limit is a minute.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(haproxy),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(run_dir / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(run_dir / "admin"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(run_dir),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(run_dir / "servers"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, available_cores() // 4))),
        "RAY_SERVE_HAPROXY_MAXCONN": str(most_clients(open_files)),
        # A HAProxy that was replaced, as gateways came or went, keeps the streams it has.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(_LONGEST_STREAM_S),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        # Serve starts HAProxy again after the third check in a row that finds none; its own period is 10 s.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",
        # One that starts on a busy machine is given up, and the gateway with it, when it has not in three times this.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(reserve_port()),
        "RAY_SERVE_LOG_TO_STDERR": "0",
    }


def start(config: Config, run_dir: Path, variables: Mapping[str, str], *, n_gpus: int = 0) -> str:
    """Start a Ray of our own, or join the one at `config.ray_address`; its address. `environment` is in force.

    The actors of a Ray of our own find `variables` in their environment and share the `n_gpus` of this machine.
    """
    import ray

    from cluster.fleet.launcher import EXPERT_RESOURCE, ROUTER_RESOURCE

    address = None if config.ray_address is None else check_there(config.ray_address)
    try:
        with _working_in(run_dir):
            if address is not None:
                ray.init(address, **_QUIETLY)
            else:
                os.environ.update(variables)
                ray.init(
                    "local",
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    num_gpus=n_gpus,
                    resources=dict.fromkeys((ROUTER_RESOURCE, EXPERT_RESOURCE), _PROCESSES),
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(run_dir),
                    **_QUIETLY,
                )
        if address is not None:
            _claim_serve(address)
    except (OSError, RuntimeError, ValueError, ConnectionError, ray.exceptions.RayError) as error:
        says = " ".join(str(error).split())
        if address is not None:
            raise StartError(f"cannot join Ray at {address}: {says}{_AUTH_HINT}") from error
        raise StartError(f"cannot start Ray: {ray_logs.cause(run_dir / LOGS) or says}") from error
    except StartError:
        ray.shutdown()  # so that `stop` finds nothing of ours in it
        raise
    worker = import_module("ray._private.worker").__dict__
    # Ray prints a paragraph for every process that dies, whatever `log_to_driver` says; Watch prints a line.
    worker["_worker_logs_enabled"] = False
    if address is None:
        worker["_global_node"].kill_log_monitor(check_alive=False)  # it reads all logs ten times a second, for nobody
    return str(ray.get_runtime_context().gcs_address)


@contextmanager
def _working_in(directory: Path) -> Iterator[None]:
    """Within, this process works in `directory`.

    Ray puts the directory in which it is started before all others on the import path of every process. A folder
    there that is called as one of our packages is would be taken for it.
    """
    try:
        before = os.getcwd()
    except FileNotFoundError:
        before = "/"
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def _claim_serve(address: str) -> None:
    """Make sure that the Ray we joined runs no Serve; what an ExpertMesh that was killed left of its own is ended.

    Where Serve listens is settled when it starts, and it outlives whoever started it. Raises StartError.
    """
    from ray import serve

    from cluster.control.client import NAME, NAMESPACE
    from cluster.fleet.launcher import end_all

    if _exists(NAME, NAMESPACE):
        raise StartError(f"Ray at {address} runs an ExpertMesh already")
    end_all()
    if not _exists("SERVE_CONTROLLER_ACTOR", "serve"):
        return
    if others := serve.status().applications.keys() - {APPLICATION}:
        raise StartError(
            f"Ray at {address} already serves {', '.join(sorted(others))}; ExpertMesh needs Ray Serve alone"
        )
    serve.shutdown()  # type: ignore[no-untyped-call]


def clear(address: str) -> str:
    """End what an ExpertMesh that was killed left behind in the Ray at `address`, and say so. StartError where one
    runs, or Serve is somebody else's."""
    os.environ.update(environment(Config(ray_address=address), Path(), 0))
    import ray

    there = check_there(address)
    try:
        ray.init(there, **_QUIETLY)
    except (OSError, RuntimeError, ValueError, ConnectionError, ray.exceptions.RayError) as error:
        raise StartError(f"cannot join Ray at {address}: {' '.join(str(error).split())}{_AUTH_HINT}") from error
    try:
        _claim_serve(there)
    finally:
        ray.shutdown()
    return f"nothing of ExpertMesh is left in the Ray at {there}"


def _exists(actor: str, namespace: str) -> bool:
    import ray

    try:
        ray.get_actor(actor, namespace)
    except ValueError:
        return False
    return True


def stop(config: Config) -> None:
    """Disconnect from Ray, and end every process that this one brought to life."""
    import ray
    from ray import serve

    if config.ray_address is not None and ray.is_initialized():
        from cluster.fleet.launcher import end_all

        end_all()
        serve.shutdown()  # type: ignore[no-untyped-call]
    family = psutil.Process().children(recursive=True)
    ray.shutdown()
    _, alive = psutil.wait_procs(family, timeout=_KILL_AFTER_S)
    _kill(alive)


def kill_children() -> None:
    """End every process that this one brought to life, at once."""
    _kill(psutil.Process().children(recursive=True))


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=_KILL_AFTER_S)
