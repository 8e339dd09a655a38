"""The admin API: an operator's verbs over HTTP, on a port of its own, behind a token; documentation is at `/docs`."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field

from cluster.control.admission import Admission
from cluster.control.autoscaler import Autoscaler
from cluster.control.chaos import Chaos
from cluster.control.faults import Fault
from cluster.control.membership import Membership
from cluster.control.observation import observe, receipt_shown
from cluster.control.operator import Operator
from cluster.control.options import AdminOptions
from cluster.control.rebalancer import Rebalancer
from cluster.control.scaling import START_TIMEOUT_S, Scaler
from cluster.errors import PlacementError
from cluster.placement.placement import Placement
from cluster.placement.planner import Plan

_MOST_PROCESSES = 10_000  # of a kind: no cluster has more, and each gets a name
_BEARER = HTTPBearer(auto_error=False)  # for the documentation: `Admission` asks for it


class Replicate(BaseModel):
    """Another replica of an expert."""

    layer: int
    expert: int
    worker: str | None = Field(None, description="default: the worker with most room that has none")


class Drop(BaseModel):
    """One replica less."""

    layer: int
    expert: int
    worker: str


class Move(BaseModel):
    """A replica elsewhere."""

    layer: int
    expert: int
    source: str | None = Field(None, description="needed when there are several replicas")
    target: str


class Homes(BaseModel):
    """A whole placement."""

    homes: list[list[dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]]] = Field(
        description="by layer and expert: worker -> share of its rows"
    )
    made_for_epoch: int | None = Field(None, description="refused when another epoch is in force; null: whichever is")


class Loads(BaseModel):
    """What to plan for."""

    loads: list[list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]] = Field(
        description="rows of each expert, by layer"
    )


class Scale(BaseModel):
    """How many processes there are to be; null: as many as there are."""

    expert_workers: int | None = Field(None, ge=1, le=_MOST_PROCESSES)
    routers: int | None = Field(None, ge=1, le=_MOST_PROCESSES)
    gateways: int | None = Field(None, ge=1, le=_MOST_PROCESSES)
    timeout_s: float = Field(
        START_TIMEOUT_S, gt=0, le=86400, description="for new ones to be ready; after it all is as before"
    )


class Inflict(BaseModel):
    """A fault of one process, for a cluster started with `--allow-chaos`."""

    kind: Literal["kill", "pause", "slow", "partition"]
    member: str = Field(description="a router, an expert worker or `controller`; of a partition the router")
    seconds: float = Field(0.0, ge=0, le=86400, description="how long; 0: for good")
    stopped: float = Field(0.9, gt=0, lt=1, description="of `slow`: the part of the time for which it is stopped")
    peer: str = Field("", description="of a partition: the expert worker that the router does not reach")


class Pin(BaseModel):
    """A replica that stays where it is."""

    layer: int
    expert: int
    worker: str


class Rebalance(BaseModel):
    """A placement that suits the recent load."""

    dry_run: bool = Field(False, description="only say what would be done")


def create_app(
    membership: Membership,
    operator: Operator,
    scaler: Scaler,
    rebalancer: Rebalancer,
    token: str,
    chaos: Chaos | None = None,
    autoscaler: Autoscaler | None = None,
) -> FastAPI:
    """The application. All paths but its documentation ask for `Authorization: Bearer TOKEN`; what cannot be done is
    409 with the reason."""
    chaos = chaos or Chaos(membership, operator.events, allowed=False)
    app = FastAPI(title="ExpertMesh admin", dependencies=[Depends(_BEARER)])
    app.add_middleware(Admission, token=token)

    @app.exception_handler(PlacementError)
    async def refused(request: Request, error: PlacementError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 409)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Without what was given: that may be a NaN, which JSON has no word for.
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)

    @app.get("/placement")
    async def show() -> dict[str, Any]:
        """The placement in force, the load and room of each worker, the change under way."""
        return _shown(membership, operator)

    @app.put("/placement")
    async def apply(body: Homes) -> dict[str, Any]:
        """Bring a whole placement into force."""
        return receipt_shown(await operator.apply(body.homes, body.made_for_epoch), membership)

    @app.get("/placement/plan")
    async def plan() -> dict[str, Any]:
        """What `rebalance` would do, with its forecast."""
        made = await asyncio.to_thread(operator.plan)
        return _plan_shown(made)

    @app.post("/placement/plan")
    async def plan_for(body: Loads) -> dict[str, Any]:
        """What `rebalance` would do if these were the loads."""
        if len({len(row) for row in body.loads}) > 1:
            raise PlacementError("every layer of `loads` needs as many experts")
        made = await asyncio.to_thread(operator.plan, loads_LE=np.array(body.loads, ndmin=2))
        return _plan_shown(made)

    @app.post("/placement/replicate")
    async def replicate(body: Replicate) -> dict[str, Any]:
        """Load another replica."""
        return receipt_shown(await operator.replicate(body.layer, body.expert, body.worker), membership)

    @app.post("/placement/drop")
    async def drop(body: Drop) -> dict[str, Any]:
        """Unload a replica."""
        return receipt_shown(await operator.drop(body.layer, body.expert, body.worker), membership)

    @app.post("/placement/move")
    async def move(body: Move) -> dict[str, Any]:
        """Load a replica elsewhere and unload it where it was."""
        return receipt_shown(await operator.move(body.layer, body.expert, body.source, body.target), membership)

    @app.post("/placement/pin")
    async def pin(body: Pin) -> dict[str, Any]:
        """Keep a replica where it is, whatever is planned; it is loaded where there is none."""
        return receipt_shown(await operator.pin(body.layer, body.expert, body.worker), membership)

    @app.post("/placement/unpin")
    async def unpin(body: Pin) -> dict[str, Any]:
        """Let a plan take it away again."""
        return receipt_shown(await operator.unpin(body.layer, body.expert, body.worker), membership)

    @app.post("/chaos")
    async def inflict(body: Inflict) -> dict[str, Any]:
        """Let a process die, hang, become slow or be cut off."""
        fault = Fault(**body.model_dump())
        await chaos.inflict(fault)
        return {"inflicted": str(fault)}

    @app.post("/rebalance")
    async def rebalance(body: Rebalance) -> dict[str, Any]:
        """Plan for the recent load and carry it out."""
        if body.dry_run:
            return {"forecast": asdict((await asyncio.to_thread(operator.plan)).forecast)}
        return receipt_shown(await operator.rebalance(), membership)

    @app.post("/scale")
    async def scale(body: Scale) -> dict[str, Any]:
        """More expert workers, which take experts over, or fewer, whose experts go to the others first; more or fewer
        routers and gateways, which finish what they have before they end."""
        receipt = await scaler.scale(body.expert_workers, body.routers, body.gateways, body.timeout_s)
        return receipt_shown(receipt, membership)

    @app.get("/fleet")
    async def fleet() -> dict[str, Any]:
        """The processes that there are to be, what is under way, and why one does not start."""
        return asdict(membership.goal) | {"failures": membership.view.failures}

    @app.post("/workers/{worker}/drain")
    async def drain(worker: str) -> dict[str, Any]:
        """Move everything away from a worker and give it nothing more."""
        return receipt_shown(await operator.drain(worker), membership)

    @app.post("/workers/{worker}/node/drain")
    async def drain_node(worker: str) -> dict[str, Any]:
        """Move everything away from all expert workers of the worker's node, which is to end."""
        return receipt_shown(await operator.drain_node_of(worker), membership)

    @app.post("/workers/{worker}/undrain")
    async def undrain(worker: str) -> dict[str, Any]:
        """Let the next rebalance use the worker again."""
        operator.undrain(worker)
        return {"drained": sorted(operator.drained)}

    @app.get("/observation")
    async def observation(known_epoch: int = 0, known_event: int = 0) -> dict[str, Any]:
        """The cluster at a glance; the placement of another epoch than the known one, events after the known one."""
        return observe(membership, operator, rebalancer, known_epoch, known_event)

    @app.get("/rebalancer")
    async def rebalancer_health() -> dict[str, Any]:
        """What the rebalancer decided last and why, how long it has been acting, when it last succeeded."""
        return asdict(rebalancer.health)

    @app.get("/autoscaler")
    async def autoscaler_health() -> dict[str, Any]:
        """How many processes the autoscaler wants of each pool and why, and what it looks at."""
        return {"mode": "off"} if autoscaler is None else asdict(autoscaler.health)

    @app.get("/receipts")
    async def receipts() -> list[dict[str, Any]]:
        """The latest actions, oldest first: forecast, cost, and the imbalance since."""
        return [receipt_shown(receipt, membership) for receipt in operator.receipts]

    return app


def _plan_shown(made: Plan) -> dict[str, Any]:
    return {
        "forecast": asdict(made.forecast),
        "made_for_epoch": made.placement.epoch - 1,
        "homes": made.placement.homes(),
    }


def _shown(membership: Membership, operator: Operator) -> dict[str, Any]:
    epochs, load = membership.epochs, membership.load
    placement: Placement = epochs.placement
    return {
        "epoch": placement.epoch,
        "acknowledged": epochs.acknowledged,
        "change": membership.under_way,
        "imbalance": 1.0 if load is None else load.imbalance,
        "workers": [
            {
                "id": member.id,
                "state": member.state,
                "drained": member.id in operator.drained,
                "slots": member.slots,
                "replicas": len(placement.shard(member.id)),
                "rows": 0 if load is None else load.total.get(member.id, 0),
                "recent_rows": 0.0 if load is None else load.recent.get(member.id, 0.0),
            }
            for member in membership.view.members
            if member.role == "expert"
        ],
        "homes": placement.homes(),
        "pins": [f"{pin.layer}:{pin.expert}@{pin.worker}" for pin in sorted(placement.pins)],
        "recent_rows": None if load is None else load.recent_LE.round(1).tolist(),
    }


async def serve(app: FastAPI, options: AdminOptions, listening: Callable[[str], None]) -> None:
    """Serve `app` for ever; `listening` is told its host:port. Raises OSError when the port is taken."""
    family = socket.getaddrinfo(options.host, 0, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((options.host, options.port), family=family)
    port = listener.getsockname()[1]
    listening(f"[{options.host}]:{port}" if ":" in options.host else f"{options.host}:{port}")
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
    await uvicorn.Server(config).serve(sockets=[listener])
