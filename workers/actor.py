"""ExpertWorker: the thin Ray shell around a shard and its server."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from concurrent.futures import Future
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from workers.checkpoint import Checkpoint
from workers.kernels.threads import set_threads
from workers.member import Member, State
from workers.shard import load_shard
from workers.spec import compute_dtype
from workers.transport.grpc_server import ExpertServer

_log = logging.getLogger(__name__)
_CALL_TIMEOUT_S = 10.0  # a call without news takes one second
_RETRY_S = 0.2
_LAST_WORD_S = 2.0


class Config(Protocol):
    """What an expert worker reads of the cluster's configuration."""

    @property
    def dtype(self) -> str: ...
    @property
    def log_level(self) -> str: ...


class Placement(Protocol):
    """What an expert worker reads of the placement."""

    @property
    def epoch(self) -> int: ...
    @property
    def workers(self) -> tuple[str, ...]: ...
    def shard(self, worker: str) -> tuple[tuple[int, int], ...]: ...


class View(Protocol):
    """What an expert worker reads of the controller's view."""

    @property
    def version(self) -> int: ...
    @property
    def placement(self) -> Placement: ...
    @property
    def draining(self) -> bool: ...


class ExpertWorker:
    """A Ray actor that holds a shard, serves it, and tells the controller where.

    The constructor's arguments and the controller's placement say everything: Ray restarts the actor with the same
    ones, and it comes back with the same experts at a new address.
    """

    def __init__(self, worker: str, config: Config, checkpoint: str, threads: int, controller: Any) -> None:
        """`checkpoint` is a directory; `controller` the handle of the actor that has `sync`. Returns at once."""
        logging.basicConfig(level=config.log_level.upper())
        set_threads(threads)
        self._worker = worker
        self._config = config
        self._checkpoint = checkpoint
        self._controller = controller
        self._node = ray.get_runtime_context().get_node_id()
        self._state: State = "starting"
        self._epoch = 0
        self._server: ExpertServer | None = None
        self._loaded: Future[str] = Future()
        threading.Thread(target=self._follow, name="membership", daemon=True).start()

    def ready(self) -> str:
        """The address it serves at, once the shard is loaded; raises what went wrong, CheckpointError above all."""
        return self._loaded.result()

    def stop(self, grace_s: float) -> None:
        """Answer what has arrived, at most `grace_s` seconds, then close every stream."""
        self._state = "draining"
        if self._server is not None:
            self._server.stop(grace_s)

    def _follow(self) -> None:
        """Register with the controller and stay in touch, for ever. Its absence changes nothing for the routers."""
        known, loading = 0, False
        while True:
            try:
                view = self._sync(known)
            except RayError as error:
                _log.warning("the controller is away: %s", type(error).__name__)
                time.sleep(_RETRY_S)
                continue
            known = view.version
            if not loading and self._worker in view.placement.workers:
                loading = True
                threading.Thread(target=self._load, args=(view.placement,), name="load", daemon=True).start()
            if view.draining and self._state == "ready":
                self._state = "draining"
                assert self._server is not None
                self._server.drain()

    def _load(self, placement: Placement) -> None:
        try:
            source = Checkpoint(self._checkpoint)
            shard = load_shard(source, placement.shard(self._worker), compute_dtype(self._config.dtype))
            server = ExpertServer(shard, self._worker, ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
            server.start()
        except Exception as error:
            _log.exception("expert worker %s cannot start", self._worker)
            self._loaded.set_exception(error)
            # It ends after it could say why, and Ray tries again.
            threading.Timer(_LAST_WORD_S, os._exit, (1,)).start()
            return
        self._server, self._epoch, self._state = server, placement.epoch, "ready"
        self._loaded.set_result(server.address)
        # The loop's own call is on its way with what was true before; this one is the news.
        with contextlib.suppress(RayError):
            self._sync(0)

    def _sync(self, known: int) -> View:
        view: View = ray.get(self._controller.sync.remote(self._member(), known), timeout=_CALL_TIMEOUT_S)
        return view

    def _member(self) -> Member:
        server = self._server
        return Member(
            role="expert",
            id=self._worker,
            pid=os.getpid(),
            node=self._node,
            state=self._state,
            address="" if server is None else server.address,
            epoch=self._epoch,
            detail={} if server is None else server.numbers(),
        )
