"""Chat templates that come with requests, rendered in a process of their own.

jinja2's sandbox keeps a template from what it must not touch, not from loops without an end or texts without bound.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from cluster.errors import ExpertMeshError, RequestError
from cluster.gateway.chat_template import ChatTemplate, Message

_TIMEOUT_S = 2.0
_MEMORY_BYTES = 512 * 1024 * 1024
_PROMPT_BYTES = 32 * 1024 * 1024  # as JSON


class TemplateProcess:
    """Renders one template at a time. A process that takes too long or too much is ended; the next one gets another.

    Belongs to the running asyncio loop. The process starts with the first template, and ends with this one.
    """

    def __init__(self, special: Mapping[str, str]) -> None:
        """`special`: the tokens that a template may name."""
        self._special = dict(special)
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def render(self, source: str, messages: Sequence[Message], **extra: Any) -> str:
        """The prompt of a conversation. Raises RequestError where `source` is no template, refuses the messages, takes
        longer than 2 s or more than 512 MB."""
        asked = {"source": source, "special": self._special, "messages": messages, "extra": extra}
        async with self._turn:
            if self._process is None or self._process.returncode is not None:
                self._process = await _start()
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    told = await _exchange(self._process, json.dumps(asked).encode())
            except (TimeoutError, ValueError, OSError, asyncio.IncompleteReadError, asyncio.CancelledError) as error:
                with suppress(ProcessLookupError):
                    self._process.kill()
                self._process = None
                if isinstance(error, asyncio.CancelledError):
                    raise
                raise _refused("takes too long or too much memory") from error
        if "error" in told:
            raise _refused(told["error"])
        return str(told["prompt"])


async def _start() -> asyncio.subprocess.Process:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cluster.gateway.template_process", env=environment, limit=_PROMPT_BYTES,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    await process.stdout.readline()  # it is ready: starting does not count as the template's time
    return process


async def _exchange(process: asyncio.subprocess.Process, line: bytes) -> dict[str, str]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(line + b"\n")
    await process.stdin.drain()
    told: dict[str, str] = json.loads(await process.stdout.readuntil(b"\n"))
    return told


def _refused(why: str) -> RequestError:
    return RequestError(f"'chat_template' {why}"[:1000], code="invalid_value", param="chat_template")


def main() -> None:
    """Render what comes line by line, until nobody is there to ask."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(flush=True)
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        try:
            prompt = ChatTemplate(asked["source"], asked["special"]).render(asked["messages"], **asked["extra"])
            told = json.dumps({"prompt": prompt})
        except (ExpertMeshError, MemoryError, RecursionError) as error:
            cause = error.__cause__ or error  # without the words about the model's own template
            is_large = isinstance(cause, MemoryError)
            told = json.dumps({"error": "takes too much memory" if is_large else f"fails: {cause}"})
        print(told, flush=True)


if __name__ == "__main__":
    main()
