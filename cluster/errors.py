"""The errors a user can meet, as one tree.

ExpertMeshError (workers.errors)
├── CheckpointError, DeviceError, WireError, WorkerLost (workers.errors)
├── ConfigError       an option that does not fit: names the option and where its value came from
├── StartError        a cluster that cannot start: port taken, memory short, a worker died
├── TextError         a text to be analysed that cannot be read
├── TraceError        a file that is no routing trace, or one of another model
├── RayGone           Ray, or the controller in it, does not answer
└── RequestError      a request that cannot be served; carries OpenAI's `code`, `param` and the HTTP status
"""

from __future__ import annotations

from workers.errors import CheckpointError, DeviceError, ExpertMeshError, WireError, WorkerLost

__all__ = [
    "CheckpointError", "ConfigError", "DeviceError", "ExpertMeshError", "PlacementError", "RayGone", "RequestError",
    "StartError", "TextError", "TraceError", "WireError", "WorkerLost",
]  # fmt: skip


class ConfigError(ExpertMeshError):
    """An option whose value does not fit."""


class StartError(ExpertMeshError):
    """The cluster cannot start."""


class PlacementError(ExpertMeshError):
    """A change of the placement that cannot be made, or was not: the one before is in force."""


class TextError(ExpertMeshError):
    """A text to be analysed that cannot be read, or that the model cannot be given."""


class TraceError(ExpertMeshError):
    """A file that cannot be read as a routing trace, or is one of another model."""


class RayGone(ExpertMeshError):
    """Ray, or the controller in it, does not answer."""


class RequestError(ExpertMeshError):
    """A request that cannot be served.

    `status` is the HTTP status, `code` OpenAI's string code (`context_length_exceeded`, `model_not_found`,
    `invalid_value`, `unsupported_parameter`, `queue_full`, ...), `param` the field at fault,
    `retry_after_s` what the `Retry-After` header says.
    """

    def __init__(
        self, message: str, *, code: str, param: str | None = None, status: int = 400, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.status = status
        self.retry_after_s = retry_after_s
