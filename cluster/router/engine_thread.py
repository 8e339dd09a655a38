"""The step loop: an engine in a thread of its own. Commands go in between steps, outputs come out after each."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import RequestError
from cluster.router.codec import internal_error
from cluster.router.params import SamplingParams, StepOutput
from workers.transport.threads import serve_thread

log = logging.getLogger(__name__)


class EngineLike(Protocol):
    """What the step loop asks of an engine. `cancel` and `stats` come from any thread, the rest from one."""

    def submit(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, emitted_ids: Sequence[int] = ()
    ) -> None:
        """Admit a request, or raise RequestError."""

    def cancel(self, request_id: str) -> None:
        """End a request and free what it holds, also during a step; unknown ids are ignored."""

    def has_work(self) -> bool:
        """Whether `step` would do anything."""

    def step(self) -> list[StepOutput]:
        """One forward pass; may block for as long as an expert worker is awaited. What fails ends requests, not it."""

    def stats(self) -> object:
        """Numbers for people; safe to call from any thread, also during a step."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that was not admitted."""

    request_id: str
    error: RequestError


class EngineThread:
    """Runs `engine` until stopped; asleep, without polling, while there is nothing to do.

    `on_outputs` is called in the thread after each step that gave something, so it must only hand over.
    """

    def __init__(self, engine: EngineLike, on_outputs: Callable[[Sequence[StepOutput | Refused]], None]) -> None:
        self._engine = engine
        self._on_outputs = on_outputs
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._refused: list[Refused] = []
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = serve_thread(self._run, "engine")

    def stop(self, timeout_s: float) -> bool:
        """End after the step in progress; False when that step is still blocked after `timeout_s`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def submit(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, emitted_ids: Sequence[int]
    ) -> None:
        self._put(lambda: self._submit(request_id, prompt_ids, params, emitted_ids))

    def cancel(self, request_ids: Sequence[str]) -> None:
        """What the engine works on ends at once, however long its step waits for a worker; what is still to be
        submitted ends right after that."""
        self._drop(request_ids)
        self._put(lambda: self._drop(request_ids))

    def _put(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._commands or self._stopping or self._engine.has_work()):
                    self._wake.wait()
                commands, self._commands = self._commands, deque()
                stopping = self._stopping
            for command in commands:
                command()
            if stopping:
                return
            outputs: list[StepOutput | Refused] = [*self._refused]
            self._refused.clear()
            if self._engine.has_work():
                outputs += self._engine.step()
            if outputs:
                self._on_outputs(outputs)

    def _submit(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, emitted_ids: Sequence[int]
    ) -> None:
        try:
            self._engine.submit(request_id, prompt_ids, params, emitted_ids)
        except RequestError as error:
            self._refused.append(Refused(request_id, error))
        except Exception:
            log.exception("the engine failed to admit request %s", request_id)
            self._refused.append(Refused(request_id, internal_error()))

    def _drop(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            try:
                self._engine.cancel(request_id)
            except Exception:
                log.exception("the engine failed to cancel request %s", request_id)
