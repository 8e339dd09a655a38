"""The class that Ray makes an expert worker's actor of, without the imports of worker or launcher.

Ray imports the module that holds an actor's class into each of its processes. Beside the launcher it would bring Ray
Serve and the gateway: 60 MB of each expert worker that nothing there calls.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.control.faults import Fault


class ExpertActor:
    """An `ExpertWorker` for a controller that has no torch: it is imported where it is to run."""

    def __init__(self, *arguments: Any) -> None:
        self._worker = import_module("cluster.fleet.expert_actor").ExpertWorker(*arguments)

    async def ready(self) -> str:
        """As `ExpertWorker.ready`."""
        return str(await self._worker.ready())

    async def inflict(self, fault: Fault) -> None:
        """As `ExpertWorker.inflict`."""
        await self._worker.inflict(fault)
