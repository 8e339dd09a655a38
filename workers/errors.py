"""The errors of the tensor side. Every message names what is wrong and what to do about it.

ExpertMeshError
├── CheckpointError   a checkpoint that cannot be served: names the file and the tensor
├── DeviceError       a GPU that was asked for and cannot be used
├── WireError         bytes of another process that do not follow the wire format
├── WorkerLost        an expert worker's stream broke, or its reply is late
│   └── GroupLost     it was lost with its group: another one may be to blame
└── ExpertNotHeld     rows for an expert that has no slot in this shard
"""

from __future__ import annotations

from collections.abc import Sequence


class ExpertMeshError(Exception):
    """Base of every error ExpertMesh raises on purpose."""


class CheckpointError(ExpertMeshError):
    """A checkpoint that cannot be served. The message names the file and the tensor."""


class DeviceError(ExpertMeshError):
    """A GPU that was asked for and is not there, or has too little memory."""


class WireError(ExpertMeshError):
    """A frame of another process that does not follow the wire format."""


class WorkerLost(ExpertMeshError):
    """The stream to an expert worker broke, or its reply did not come within the deadline."""

    def __init__(self, worker: str, reason: str) -> None:
        super().__init__(f"expert worker {worker}: {reason}")
        self.worker = worker
        self.reason = reason


class GroupLost(WorkerLost):
    """The group that joined the router and the worker broke: the next one may have the worker back at once."""


class ExpertNotHeld(ExpertMeshError):
    """Rows for experts of a layer that have no slot in this shard: the sender routed by another placement."""

    def __init__(self, layer: int, experts: Sequence[int]) -> None:
        names = ", ".join(map(str, experts))
        super().__init__(f"layer {layer}: this shard holds no replica of expert {names}")
        self.layer = layer
        self.experts = tuple(experts)
