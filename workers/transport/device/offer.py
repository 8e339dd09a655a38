"""What the two ends tell each other before rows travel through device memory, as text in the handshake of gRPC."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from workers.errors import DeviceError
from workers.transport.device.rows import Layout

MAX_WORKERS = 32
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True, slots=True)
class Shape:
    """What both ends must agree on."""

    n_layers: int
    n_experts: int
    top_k: int
    hidden_size: int
    dtype: torch.dtype
    n_rows: int  # most rows of a router in a captured step

    @property
    def layout(self) -> Layout:
        """Of a router's rows."""
        return Layout(self.n_rows, self.top_k, self.hidden_size, self.dtype, MAX_WORKERS)


@dataclass(frozen=True, slots=True)
class Offer:
    """Of a router to one worker."""

    router: int  # a number that no other router has
    worker: int  # the number that this router gives the worker
    device: str  # "cuda" or "cpu": whose memory the rows lie in
    page: str  # the router's words
    rows: str  # its rows
    shape: Shape

    def text(self) -> str:
        """For the handshake."""
        said = asdict(self)
        said["shape"]["dtype"] = str(self.shape.dtype)
        return json.dumps(said)

    @classmethod
    def parse(cls, text: str) -> Offer:
        """Raises DeviceError for what no router says."""
        try:
            said: dict[str, Any] = json.loads(text)
            shape = said["shape"]
            shape["dtype"] = _DTYPES[shape["dtype"]]
            offer = cls(**(said | {"shape": Shape(**shape)}))
        except (ValueError, KeyError, TypeError) as error:
            raise DeviceError(f"an offer that cannot be read: {type(error).__name__}") from None
        sizes = (shape["n_layers"], shape["top_k"], shape["hidden_size"], shape["n_rows"])
        if not all(type(size) is int and 0 < size < 1 << 20 for size in sizes) or not 0 <= offer.worker < MAX_WORKERS:
            raise DeviceError("an offer of impossible sizes")
        return offer
