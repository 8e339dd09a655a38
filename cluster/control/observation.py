"""The cluster at a glance, as one JSON document: for the live page and `expertmesh status --watch`."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from cluster.control.membership import Membership
from cluster.control.operator import Operator
from cluster.control.rebalancer import Rebalancer
from cluster.control.receipt import Receipt
from cluster.control.view import Member
from cluster.placement.load import WINDOW_S, Load, imbalance
from cluster.placement.placement import Placement


def observe(
    membership: Membership,
    operator: Operator,
    rebalancer: Rebalancer,
    known_epoch: int = 0,
    known_event: int = 0,
) -> dict[str, Any]:
    """What there is to see now. The placement is left out where its epoch is `known_epoch`, and events up to
    `known_event` are."""
    epochs, load, view = membership.epochs, membership.load, membership.view
    placement = epochs.placement
    layers = range(placement.n_layers)
    return {
        "at": time.time(),
        "draining": view.draining,
        "epoch": placement.epoch,
        "acknowledged": epochs.acknowledged,
        "change": membership.under_way,
        "window_s": WINDOW_S,
        "imbalance": None if load is None else load.imbalance,
        "members": [_member(member, operator, placement, load) for member in view.members],
        "load": None if load is None else load.recent_LE.round().astype(int).tolist(),
        "layer_skew": None if load is None else [_layer(load, placement, layer) for layer in layers],
        "placement": None if placement.epoch == known_epoch else _placement(placement),
        "rebalancer": asdict(rebalancer.health),
        "last_action": receipt_shown(operator.receipts[-1], membership) if operator.receipts else None,
        "events": [asdict(event) for event in operator.events.after(known_event)],
    }


def receipt_shown(receipt: Receipt, membership: Membership) -> dict[str, Any]:
    """A receipt as JSON, with what has come of it until now."""
    shown = asdict(receipt)
    del shown["rows_then"]
    return shown | {"imbalance_since": receipt.realised(membership.rows)}


def _member(member: Member, operator: Operator, placement: Placement, load: Load | None) -> dict[str, Any]:
    """One process, without where it listens: a browser needs no address."""
    shown: dict[str, Any] = {
        "role": member.role,
        "id": member.id,
        "pid": member.pid,
        "state": member.state,
        "epoch": member.epoch,
        "detail": member.detail,
    }
    if member.role == "expert":
        shown |= {
            "drained": member.id in operator.drained,
            "slots": member.slots,
            "replicas": len(placement.shard(member.id)),
            "rows": None if load is None else round(load.recent.get(member.id, 0.0)),
        }
    return shown


def _layer(load: Load, placement: Placement, layer: int) -> float | None:
    """Most over mean of the rows of a layer's experts; None where it has none."""
    return imbalance(load.recent_LE[layer].tolist()) if placement.replicas[layer] else None


def _placement(placement: Placement) -> dict[str, Any]:
    return {
        "workers": placement.workers,
        "replicas": placement.replicas,  # by layer and expert: indices of workers
        "shares": placement.shares,
    }
