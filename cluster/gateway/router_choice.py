"""Which router a request goes to."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.gateway.journal import Entry
from cluster.gateway.router_stream import RouterStream

# Of its equal share of the open requests a router may have so many times as much, to use what is in its cache
# (consistent hashing with bounded loads: Mirrokni, Thorup and Zadimoghaddam, SODA 2018).
_MOST_OF_SHARE = 1.25


def best_router(candidates: Sequence[RouterStream], entry: Entry) -> RouterStream:
    """The router that computed most of the prompt already, of those that are not clearly busier than the others; where
    there are several, the one with the fewest requests of ours."""
    n_open = sum(stream.n_open for stream in candidates) + 1
    most = math.ceil(_MOST_OF_SHARE * n_open / len(candidates))
    free = (stream for stream in candidates if stream.n_open < most)
    return min(free, key=lambda stream: (-stream.seen.shared(entry.prefixes), stream.n_open))
