"""The expert worker's side of the collective transport: an ExpertShard in the groups that the worker is in."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from workers.shard import ExpertShard
from workers.transport.batcher import Batcher
from workers.transport.collective_beat import beat
from workers.transport.collective_joiner import BUILD_S, Joiner
from workers.transport.collective_lane import RouterLane, Work
from workers.transport.collective_mesh import Broken, Mesh
from workers.transport.group import Group


class CollectiveServer:
    """Serves one shard to all routers of a group; of two groups, while one follows the other."""

    def __init__(
        self,
        shard: ExpertShard,
        worker: str,
        host: str,
        *,
        deadline_s: float = 2.0,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        """Connections are bound to the interface of `host`. A router that takes no beat for `deadline_s` is lost.

        on_change: called by some thread when a group became ready or broke. Raises RuntimeError when `host` is not an
        address of this machine.
        """
        self.ready = 0  # number of the newest group that was built
        #: One for every start of the process. Routers find it through the group, so nobody connects to it.
        self.address = f"{host}/{os.getpid()}"
        self._deadline_s = deadline_s
        self._shard = shard
        self._work = Work(shard, Batcher(shard, shard.device))
        self._lanes: list[RouterLane] = []
        self._joiner = Joiner(worker, host, shard.device, self._live, on_change)

    @property
    def broken(self) -> int:
        """Number of the newest group that broke or could not be built; 0: none did."""
        return self._joiner.broken

    def join(self, group: Group | None) -> None:
        """Take part in `group` as soon as it is built. From any thread; returns at once, and may be repeated."""
        self._joiner.join(group)

    def start(self) -> None:
        """Nothing to do: requests come with the first group."""

    def drain(self) -> None:
        """Nothing to do: the group that follows is formed without this worker."""

    def stop(self, grace_s: float) -> None:
        """Answer what has arrived (at most `grace_s` seconds), then end every group."""
        self._work.wait_until_idle(grace_s)
        self._joiner.close()

    def numbers(self) -> dict[str, object]:
        """For people: experts held, bytes, rows and seconds computed, the group and its routers."""
        return {
            "experts": len(self._shard.slots),
            "weight_bytes": self._shard.weight_bytes,
            "rows": self._work.batcher.rows,
            "compute_seconds": round(self._work.batcher.compute_seconds, 3),
            "group": self.ready,
            "streams": len(self._lanes),
        }

    def _live(self, mesh: Mesh) -> None:
        """The life of a group, in a thread of its own: it lasts until every router has left."""
        lanes = {router: RouterLane(mesh, router, self._work) for router in mesh.routers}
        threads = [threading.Thread(target=lane.serve, name="experts", daemon=True) for lane in lanes.values()]
        for thread in threads:
            thread.start()
        self._lanes.extend(lanes.values())
        self.ready = max(self.ready, mesh.group.number)
        self._joiner.changed()
        try:
            beat(mesh, lambda: [router for router, lane in lanes.items() if not lane.left], BUILD_S, self._deadline_s)
        except Broken as broken:
            mesh.fail(str(broken))
        finally:
            mesh.close()
            for thread in threads:
                thread.join()
            for lane in lanes.values():
                self._lanes.remove(lane)
