"""How Ctrl-C and SIGTERM reach the work in progress."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked this process to end."""


class Signals:
    """Raises Stopped where a signal arrives, or, while `deferred`, at the next `check`.

    Code that calls into Ray defers: an exception that appears inside its C++ comes out as something else.
    """

    def __init__(self) -> None:
        self._arrived = False
        self._deferred = False
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.install()

    def install(self) -> None:
        """Take the signals, also from a library that took them."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Stopped if a signal arrived since the last time it was raised."""
        if self._arrived:
            self._arrived = False
            raise Stopped

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, signals wait for `check`; what arrived unchecked is dropped with the end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = self._arrived = False

    @contextmanager
    def heard_at_once(self, end: Callable[[], None], patience_s: float) -> Iterator[None]:
        """Within, `end` is called in a thread when a signal has waited for `patience_s`.

        Python tells of signals between two of its own instructions: a library that waits for minutes hides them.
        """
        asleep, awake = socket.socketpair()
        awake.setblocking(False)
        done = threading.Event()

        def watch() -> None:
            if asleep.recv(1) != b"" and not done.wait(patience_s):
                end()

        before = signal.set_wakeup_fd(awake.fileno(), warn_on_full_buffer=False)
        watcher = threading.Thread(target=watch, name="signals", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            signal.set_wakeup_fd(before)
            awake.close()
            watcher.join()
            asleep.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._arrived = True
        if not self._deferred:
            self.check()
