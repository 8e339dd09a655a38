"""Catches a router that stops looking after its workers as one of them has moved."""

from __future__ import annotations

import threading
import time

from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.pulse import Pulse


def pulse() -> Pulse:
    return Pulse("127.0.0.1:1", Credentials("token"), 0.5)  # where nobody listens


def test_a_pulse_that_was_closed_meanwhile_asks_nobody() -> None:
    """The thread that looks has taken it from a list that the step loop changes as a worker comes back elsewhere."""
    closed = pulse()
    closed.close()
    assert not closed.look(time.monotonic(), 0.0)
    assert closed.answers is None


def test_closing_in_the_middle_of_a_look_is_no_error() -> None:
    errors: list[Exception] = []
    pulses = [pulse() for _ in range(30)]
    begin = threading.Barrier(2)

    def look() -> None:
        for each in pulses:
            begin.wait()
            try:
                for _ in range(20):
                    each.hurry()
                    each.look(time.monotonic(), 0.0)
            except Exception as error:
                errors.append(error)

    watching = threading.Thread(target=look)
    watching.start()
    for each in pulses:
        begin.wait()
        each.close()
    watching.join()
    assert not errors
