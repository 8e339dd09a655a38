"""What an expert worker does with a request, whichever way it came: check it, compute it, or say why not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import CancelledError

from torch import Tensor

from workers.errors import ExpertMeshError, WireError
from workers.shard import ExpertShard
from workers.transport.batcher import Batcher
from workers.wire import Header, Request

_log = logging.getLogger(__name__)


def answer(
    shard: ExpertShard, batcher: Batcher, header: Header, request: Request, is_wanted: Callable[[], bool]
) -> tuple[Tensor, int] | str | None:
    """y_PD in host memory and the nanoseconds it took; or why it was not computed; None: nobody wants it any more."""
    try:
        check(shard, header, request)
        return batcher.compute(header.tag.layer, request, is_wanted)
    except CancelledError:
        return None
    except Exception as error:
        return reason(header, error)


def reason(header: Header, error: Exception) -> str:
    """For the router, which repairs this elsewhere; the worker lives on for the others."""
    if isinstance(error, ExpertMeshError):
        return str(error)
    _log.error("layer %d, %d pairs", header.tag.layer, header.n_pairs, exc_info=error)
    return f"{type(error).__name__}: {error}"


def check(shard: ExpertShard, header: Header, request: Request) -> None:
    """Raises WireError for rows that the shard cannot compute."""
    layer = header.tag.layer
    if (header.width, header.dtype) != (shard.hidden_size, shard.dtype):
        raise WireError(f"rows of {header.width} {header.dtype}, not {shard.hidden_size} {shard.dtype}")
    if layer >= shard.n_layers or int(request.expert_P[-1]) >= shard.n_experts:
        raise WireError(f"layer {layer}, expert {int(request.expert_P[-1])}: the model does not have it")
