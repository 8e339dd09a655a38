"""Lost parts of a dispatch: to other replicas, or to the same worker when it is back, until nothing is missing.

Legend: P pairs, D hidden size.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from cluster.router.exchange.sender import Part, Sender
from cluster.router.exchange.split import rows_of
from workers.errors import WorkerLost

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.02, 0.25


def repair(sender: Sender, lost: list[Part], rows_PD: Tensor, timeout_s: float) -> None:
    """Bring the rows of `lost` into their places in `rows_PD`.

    Raises WorkerLost when experts stay without a live replica for longer than `timeout_s`.
    """
    began = time.monotonic()
    pause_s = _FIRST_PAUSE_S
    while lost:
        sender.counters.retries.update(part.reply.worker for part in lost)
        sender.follow(lost)
        lost = sender.receive([again for part in lost for again in _resend(sender, part)], rows_PD)
        if not lost:
            break
        left = began + timeout_s - time.monotonic()
        if left <= 0 or sender.views.closed:
            raise _given_up(lost[0], timeout_s)
        if not sender.views.wait(min(pause_s, left)):
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)
    sender.counters.repair_seconds += time.monotonic() - began


def _resend(sender: Sender, part: Part) -> list[Part]:
    """The rows of `part` on the way to whoever holds their experts now, one part for each."""
    x_TD, token_P, expert_P = part.rows.request
    layer, attempt = part.rows.tag.layer, part.rows.tag.attempt + 1
    routes = sender.routes
    rows_E = np.bincount(expert_P.numpy(), minlength=routes.n_experts)
    owner_P = torch.from_numpy(routes.owners(layer, rows_E))[expert_P]
    at_P = torch.arange(part.at.start, part.at.stop) if isinstance(part.at, slice) else part.at
    parts = []
    for worker in np.unique(owner_P.numpy()).tolist():
        chosen_P = owner_P == worker
        rows = rows_of(sender.tag(layer, attempt), x_TD, token_P[chosen_P], expert_P[chosen_P])
        out_PD = x_TD.new_empty(rows.n_pairs, x_TD.shape[1])
        parts.append(sender.send(worker, rows, at_P[chosen_P], out_PD))
    return parts


def _given_up(part: Part, timeout_s: float) -> WorkerLost:
    assert part.reply.loss is not None
    where = f"layer {part.rows.tag.layer}, experts {np.unique(part.rows.request.expert_P.numpy()).tolist()}"
    reason = f"{where}: no replica within {timeout_s:g} s; {part.reply.loss.reason}"
    return WorkerLost(part.reply.worker, reason)
