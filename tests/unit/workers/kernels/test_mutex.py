"""A lock that lets two in, or that keeps Python's other threads from running while one waits for it."""

from __future__ import annotations

import threading

from workers.kernels.mutex import Mutex


def test_one_at_a_time() -> None:
    mutex, total = Mutex(), [0]

    def add() -> None:
        for _ in range(2000):
            with mutex:
                before = total[0]
                total[0] = before + 1

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert total == [8000]


def test_who_waits_lets_the_others_run_and_who_does_not_wait_is_told() -> None:
    mutex, waiting, taken = Mutex(), threading.Event(), threading.Event()
    assert mutex.acquire()
    assert not mutex.acquire(blocking=False)

    def wait() -> None:
        waiting.set()
        with mutex:
            taken.set()

    threading.Thread(target=wait).start()
    assert waiting.wait(60) and not taken.is_set()
    mutex.release()
    assert taken.wait(60)
    assert Mutex().acquire(blocking=False)
