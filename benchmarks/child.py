"""A process that answers one line of JSON for another: how benchmarks keep engines out of each other's way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from cluster.errors import StartError


class Child:
    """The asking side. The process ends when it is closed or when its parent ends."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Returns once the process is ready. Raises StartError when it ends before."""
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
        self._reply()

    def ask(self, **request: Any) -> Any:
        """The answer to `request`. Raises StartError when the process ends instead."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `_reply` says with what exit code
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._reply()

    def close(self) -> None:
        """End the process and those it started."""
        with self._process, suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise StartError(f"{self.name} ended with exit code {self._process.wait()}")
        return json.loads(line)


class ChildRunner:
    """A `Runner` in a process of its own."""

    def __init__(self, child: Child) -> None:
        self.name = child.name
        self._child = child

    def decode(self, batch: int) -> float:
        """See `Runner`."""
        return float(self._child.ask(method="decode", size=batch))

    def prefill(self, n_tokens: int) -> float:
        """See `Runner`."""
        return float(self._child.ask(method="prefill", size=n_tokens))


def serve(start: Callable[[], Callable[[dict[str, Any]], Any]]) -> None:
    """The answering side: `start` makes the function that answers. Whatever it prints goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answer = start()
    print(json.dumps("ready"), file=replies)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=replies)
