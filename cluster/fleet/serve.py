"""`expertmesh serve`: check, start, watch, drain, stop."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

from cluster.config import Config
from cluster.config_load import tls_files
from cluster.errors import ExpertMeshError, RayGone
from cluster.fleet import local_ray, preflight, prometheus, ray_logs, snapshot
from cluster.fleet.mps import Mps
from cluster.fleet.open_files import raise_limit
from cluster.fleet.prometheus import Prometheus
from cluster.fleet.ray_token import ensure_token
from cluster.fleet.run_state import RunDirectory, RunState, credentials_path, make_admin_token, since_boot
from cluster.fleet.signals import Signals, Stopped
from cluster.fleet.watch import Watch
from cluster.models import resolve
from cluster.observe import tracing
from cluster.state_dir import cache_home
from workers.transport.grpc.credentials import Credentials

if TYPE_CHECKING:  # Ray is imported once its environment is in force
    from cluster.control.view import View
    from cluster.fleet.launch import Cluster

_PATIENCE_S = 3.0  # after which a Ctrl-C does not wait for what Ray is doing
_MISSING_AFTER_S = 15.0  # a file system may be away for a moment, and a HAProxy that ended for 4 s, its socket with it
_HUNG_AFTER_S = 19.0  # without a word of the controller, which `Cluster.news` waits for 10 s at a time, it is ended
_GONE_AFTER_S = 30.0  # without one by then, Ray itself must be gone
_TICK_S = 0.2


def serve(config: Config, console: Console) -> None:
    """Run a cluster in the foreground until a signal ends it. Raises ExpertMeshError saying why it cannot start."""
    signals = Signals()
    run: RunDirectory | None = None
    try:
        open_files = raise_limit()
        if config.ray_address is None:
            preflight.check_port(config.host, config.port)
        if config.prometheus:
            prometheus.check_installed()
        if config.otlp_traces_endpoint is not None:
            tracing.check_installed()
        checkpoint = resolve(config.model)
        with console.status(f"checking {checkpoint}"):
            plan = preflight.plan(config, checkpoint)
            note = preflight.check_gateway(config, checkpoint, plan.vocab_size)
        if note:
            console.print(f"note: {note}", style="yellow", highlight=False)
        if config.ray_address is None:
            preflight.check_memory(plan)
        config = plan.config
        run = RunDirectory.make()
        os.environ.update(local_ray.environment(config, run.path, open_files))
        _run(config, plan, run, signals, console)
    except Stopped:
        console.print("stopped", style="dim")
    except ExpertMeshError as error:
        if run is not None and (kept := ray_logs.keep(run.path / local_ray.LOGS, _logs_directory())) is not None:
            raise type(error)(f"{error} (logs: {kept})") from error
        raise
    finally:
        signals.restore()
        if run is not None:
            run.remove()


def _run(config: Config, plan: preflight.Plan, run: RunDirectory, signals: Signals, console: Console) -> None:
    """Everything between the start of Ray and its end; raises Stopped, or what went wrong."""
    from workers import device
    from workers.kernels.threads import process_environment

    began = time.monotonic()
    if config.ray_address is None:
        ensure_token(os.environ)
    myself = psutil.Process()
    state = RunState(
        pid=myself.pid,
        started=since_boot(myself),
        url=base_url(config),
        port=config.port,
        ray_address="",
        run_dir=str(run.path),
        model=plan.model_name,
        transport=plan.transport.transport,
        transport_reason=plan.transport.reason,
        cluster=plan.config.cluster_name or "",
    )
    state.write()
    mps, metrics = Mps(run.path), Prometheus(run.path)

    def give_up() -> None:
        console.print("stopped", style="dim")
        local_ray.kill_children()
        mps.stop()
        state.remove()
        run.remove()
        os._exit(0)

    with signals.deferred():
        try:
            with console.status("starting Ray"), signals.heard_at_once(give_up, _PATIENCE_S):
                # Of the most that any of them uses: each sets its own number when it starts.
                threads = max(plan.worker_threads, plan.router_threads)
                variables = process_environment(threads) | (device.ENVIRONMENT if plan.gpus else {})
                if any(use.gpus < 1 for use in plan.uses) and config.ray_address is None:
                    variables |= _share_gpus(mps, console)
                address = local_ray.start(config, run.path, variables, n_gpus=len(plan.gpus))
            signals.install()  # Ray takes them when it starts
            signals.check()
            if (
                config.ray_address is not None
            ):  # not before: the port may have been held by a Serve that was left behind
                preflight.check_port(config.host, config.port)
            console.print(f"Ray at {address}", style="dim", highlight=False)
            state = replace(state, ray_address=address)
            state.write()
            if config.prometheus:
                metrics.start(signals.check)
                console.print(f"Prometheus at {metrics.url}", style="dim", highlight=False)
            _serve(config, plan, state, run, signals, console, began)
        finally:
            with console.status("stopping"):
                metrics.stop()
                local_ray.stop(config)
                mps.stop()
            state.remove()


def _share_gpus(mps: Mps, console: Console) -> Mapping[str, str]:
    """What has to be in the environment of processes that share a GPU."""
    if why := mps.start():
        slow = "processes that share a GPU take turns of milliseconds"
        console.print(f"without NVIDIA's multi-process service ({why}) {slow}", style="yellow", highlight=False)
        return {}
    return mps.variables


def _serve(
    config: Config,
    plan: preflight.Plan,
    state: RunState,
    run: RunDirectory,
    signals: Signals,
    console: Console,
    began: float,
) -> None:
    from cluster.fleet.launch import launcher_of, start_controller, wait_ready

    credentials = Credentials.generate(tls_files(config), config.trusted_network)
    credentials.write(credentials_path(Path(state.run_dir)))  # for `bench serve --router`
    admin_token = make_admin_token(Path(state.run_dir), config.admin_token_file)
    cluster = start_controller(plan, launcher_of(plan, state.url, credentials), admin_token)
    console.print(f"transport: {state.transport} ({state.transport_reason})", style="dim", highlight=False)
    for use in plan.uses:
        console.print(str(use), style="dim", highlight=False)
    console.print(f"sampling defaults: {_defaults(plan)}", style="dim", highlight=False)
    gateways = [f"gateway-{rank}" for rank in range(config.gateways)]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        loaded: dict[str, int] = {}
        task = progress.add_task("starting", total=plan.load_bytes)

        def show(view: View) -> None:
            snapshot.write(state, view)
            states = dict.fromkeys((*plan.workers, *plan.routers, *gateways), "loading")
            states.update({member.id: member.state for member in view.members})
            for member in view.members:
                loaded[member.id] = int(str(member.detail.get("loaded_bytes", loaded.get(member.id, 0))))
            description = ", ".join(f"{name} {state}" for name, state in states.items())
            progress.update(task, description=description, completed=sum(loaded.values()))

        wait_ready(cluster, show, signals.check)
    _greet(config, plan, state, console, time.monotonic() - began)
    try:
        needed = local_ray.FILES if config.ray_address is None else ()
        _supervise(cluster, state, lambda: run.missing(*needed), signals, Watch(console))
    except Stopped:
        _drain(cluster, state, config.drain_timeout_s, signals, console)
        raise


def _supervise(
    cluster: Cluster, state: RunState, missing: Callable[[], Path | None], signals: Signals, watch: Watch
) -> None:
    """Keep the snapshot and tell of processes that leave and return, until a signal comes.

    Ray restarts what dies; the data plane repairs itself; how many processes there are is the controller's business.
    Raises ExpertMeshError if Ray ends, or if somebody removed files that the cluster cannot be reached without.
    """
    heard = whole = time.monotonic()
    ended = False  # the controller, since it was heard last
    while True:
        signals.check()
        if (gone := missing()) is None:
            whole = time.monotonic()
        elif time.monotonic() - whole > _MISSING_AFTER_S:
            raise ExpertMeshError(f"{gone} was removed, and with it the way in; keep {state.run_dir} while this runs")
        try:
            view = cluster.news(_TICK_S)
        except RayGone as error:
            if time.monotonic() - heard > _GONE_AFTER_S:
                raise ExpertMeshError(f"Ray is gone: {error}") from error
            if time.monotonic() - heard > _HUNG_AFTER_S and not ended:
                ended = True
                if cluster.end_controller():
                    heard = time.monotonic()  # Ray starts another
            time.sleep(_TICK_S)
            continue
        if view is not None:
            heard, ended = time.monotonic(), False
            snapshot.write(state, view)
            watch.see(view)


def _drain(cluster: Cluster, state: RunState, timeout_s: float, signals: Signals, console: Console) -> None:
    """Take no new requests, let the open ones finish. A second signal ends it at once."""
    deadline = time.monotonic() + timeout_s
    try:
        cluster.drain()
        with console.status("finishing open requests (Ctrl-C: end at once)") as status:
            while time.monotonic() < deadline:
                signals.check()
                if (view := cluster.news(_TICK_S)) is None:
                    continue
                snapshot.write(state, view)
                gateways = [m for m in view.members if m.role == "gateway" and m.state != "lost"]
                n_open = sum(int(str(m.detail.get("open", 0))) for m in gateways)
                if n_open == 0 and all(m.state == "draining" for m in gateways):
                    return
                status.update(f"finishing {n_open} open requests (Ctrl-C: end at once)")
        console.print(f"requests were still open after {timeout_s:g} s", style="yellow", highlight=False)
    except (RayGone, Stopped):
        pass


def _logs_directory() -> Path:
    """Where the logs of starts that failed are kept."""
    return (cache_home() or Path("/nonexistent")) / "expertmesh" / "logs"


def base_url(config: Config) -> str:
    """Where a client on this machine reaches the gateway."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}"


def _greet(config: Config, plan: preflight.Plan, state: RunState, console: Console, seconds: float) -> None:
    key = '-H "Authorization: Bearer $OPENAI_API_KEY" ' if config.api_keys_file else ""
    body = f'{{"model": "{plan.model_name}", "stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    console.print(f"[green]ready[/] in {seconds:.1f} s: {plan.model_name} with {_size(plan)}", highlight=False)
    console.print(f"OpenAI base URL: [bold]{state.url}/v1[/]", highlight=False)
    print(f"try: curl -N {state.url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d '{body}'")
    console.print("Ctrl-C ends it", style="dim")
    sys.stdout.flush()


def _defaults(plan: preflight.Plan) -> str:
    named = str(plan.defaults)
    return f"{named} (generation_config.json; not with --no-generation-defaults)" if named else "temperature 1"


def _size(plan: preflight.Plan) -> str:
    def count(n: int, noun: str) -> str:
        return f"{n} {noun}" if n == 1 else f"{n} {noun}s"

    routers = count(len(plan.routers), "router")
    return f"{routers} and {count(len(plan.workers), 'expert worker')}" if plan.workers else f"{routers}, all in one"
