"""Log lines as text, or each event as one line of JSON.

What clients sent and what models answered is in neither: no prompt, no token, no key. Errors that are not ours may
quote what they choked on, so that in JSON they appear by their type and place alone.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Literal

from cluster.observe.context import request_id
from workers.errors import ExpertMeshError

Format = Literal["text", "json"]

# Fields that `extra=` may add to a line; more would be an invitation to log what must not be.
FIELDS = ("request_id", "request_ids", "route", "status", "seconds", "router", "worker", "tokens", "finish")


def configure(level: str, form: Format, process: str) -> None:
    """Let the loggers of this process write to stderr; `process` is its name in the cluster."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process) if form == "json" else logging.Formatter(logging.BASIC_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=form == "json")


class JsonLines(logging.Formatter):
    """One line for each event; the id of the request that it happened in is in `request_id`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "event": record.getMessage(),
        }
        if known := request_id.get():
            said["request_id"] = known
        said |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info and record.exc_info[1] is not None:
            said |= _error(record.exc_info[1])
        return json.dumps(said, default=str)


def _error(error: BaseException) -> dict[str, object]:
    frames = traceback.extract_tb(error.__traceback__)
    shown: dict[str, object] = {
        "error": type(error).__name__,
        "stack": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
    return shown | ({"reason": str(error)} if isinstance(error, ExpertMeshError) else {})
