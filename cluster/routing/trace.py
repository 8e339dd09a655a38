"""The routing trace: a file of counts of what gates chose, window by window, for the planner and for people.

One line of JSON says what model it is, one line for each window what was counted in it; names ending in .gz are packed,
each line for itself, so that a file is whole after every line. Counts alone are kept, and of many tokens together:
the experts of a single token, over all layers, would tell what token it was.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.errors import TraceError
from cluster.routing.counts import RoutingCounts

_FORMAT = "expertmesh-routing-trace-1"


@dataclass(frozen=True, slots=True)
class Header:
    """What was traced."""

    model: str
    n_layers: int
    n_experts: int  # of a layer
    top_k: int
    sample: float  # share of the steps that was counted


@dataclass(frozen=True, slots=True)
class Window:
    """The counts of some time, or of a text."""

    name: str  # the router, or the domain of the texts
    began: float  # seconds since 1970
    seconds: float
    counts: RoutingCounts


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole file, or all files of a folder."""

    header: Header
    windows: tuple[Window, ...]

    def total(self) -> RoutingCounts:
        """All windows together."""
        total = RoutingCounts.zeros(self.header.n_layers, self.header.n_experts)
        for window in self.windows:
            total.add(window.counts)
        return total


def check(path: Path, header: Header) -> None:
    """Raise TraceError where the file is there already and is not one of `header`, to which windows can be added."""
    if path.exists() and path.stat().st_size and _read(path)[0] != header:
        raise TraceError(f"{path}: was written for another model or sample; name another directory, or remove it")


def append(path: Path, header: Header, window: Window) -> None:
    """Add a window to the file, which begins with the header. Raises OSError."""
    fresh = not path.exists() or path.stat().st_size == 0
    lines = [{"format": _FORMAT} | asdict(header)] if fresh else []
    shown = {"name": window.name, "began": round(window.began, 3), "seconds": round(window.seconds, 3)}
    lines.append(shown | window.counts.to_json())
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
    with path.open("ab") as file:
        file.write(gzip.compress(text) if path.suffix == ".gz" else text)


def read_trace(path: Path) -> Trace:
    """The trace in a file, or those in all files of a folder, which have to be of one model. Raises TraceError."""
    files = sorted(file for file in path.glob("*.jsonl*") if file.is_file()) if path.is_dir() else [path]
    if not files:
        raise TraceError(f"{path}: no *.jsonl or *.jsonl.gz in this directory")
    header: Header | None = None
    windows: list[Window] = []
    for file in files:
        found, counted = _read(file)
        if header is not None and _shape(found) != _shape(header):
            raise TraceError(f"{file}: of another model than {files[0]}")
        header = header or found
        windows += counted
    assert header is not None
    if not windows:
        raise TraceError(f"{path}: nothing was counted yet")
    return Trace(header, tuple(windows))


def _shape(header: Header) -> tuple[int, int, int]:
    return header.n_layers, header.n_experts, header.top_k


def _read(path: Path) -> tuple[Header, list[Window]]:
    try:
        lines = list(_objects(path))
        if not lines or lines[0].pop("format", None) != _FORMAT:
            raise TraceError(f"{path}: is no routing trace; `serve --routing-trace` and `analyze` write some")
        header = Header(**lines[0])
        windows = [
            Window(line["name"], float(line["began"]), float(line["seconds"]), RoutingCounts.from_json(line))
            for line in islice(lines, 1, None)
        ]
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TraceError(f"{path}: cannot be read as a routing trace: {error}") from error
    if any(window.counts.first_LE.shape != (header.n_layers, header.n_experts) for window in windows):
        raise TraceError(f"{path}: a window is not of {header.n_layers} layers and {header.n_experts} experts")
    return header, windows


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The lines; one that a process did not finish, the last, is left out."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    whole, _, _ = text.rpartition("\n")
    for line in whole.splitlines():
        yield json.loads(line)
