"""The table: every series there is."""

from __future__ import annotations

from typing import Final

from cluster.observe.series import controller, gateway, process, router, worker
from cluster.observe.series.base import Series

TABLE: Final[tuple[Series, ...]] = tuple(
    value
    for module in (gateway, router, worker, controller, process)
    for value in vars(module).values()
    if isinstance(value, Series)
)
