"""Which routers step together: a few words in host memory, no message and no lock.

Each process has a page that it alone writes and its peers read. A router asks for a step there; one of the workers, the
conductor, answers whom the next step is for; those routers repeat the answer in their own pages, which is where the
other workers read it. So nobody has to see more pages than those of its own pairs, and a router without rows takes no
part and delays nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int64]

PAGE_BYTES = 4096
MAX_ROUTERS = 16

# Of a router's page, in words: what it asks for, and the number + 1 that it gave the worker that conducts.
_REQUEST, _ROWS, _CONDUCTOR = 2, 3, 4
# Of a worker's page: the last step that it is done with, whether that was void, and which routers it is ready for.
_ENDED, _VOID, _READY = 2, 3, 64
_STEP = 16  # of both: the step agreed on
_GATHER_S = 0.002  # what sampling and scheduling differ by between routers that came out of one step together
_SPINS = 2000


class Step(NamedTuple):
    """A step agreed on."""

    number: int  # rises, 1 at least
    n_rows: int  # most rows of one router in it
    routers: tuple[int, ...]  # those with rows, by the number that each has given itself

    def write(self, words: Words) -> None:
        """Into one's own page."""
        n = len(self.routers)
        words[_STEP : _STEP + 4 + n] = (self._check(), self.number, self.n_rows, n, *self.routers)

    @classmethod
    def read(cls, words: Words) -> Step | None:
        """Of another's page; None while there is none, or it is just being written."""
        check, number, n_rows, n, *routers = words[_STEP : _STEP + 4 + MAX_ROUTERS].tolist()
        step = cls(number, n_rows, tuple(routers[: max(n, 0)]))
        return step if number > 0 and step._check() == check else None

    def _check(self) -> int:
        """Tells words that belong together from those of two steps, in whatever order a reader sees them."""
        return hash((self.number, self.n_rows, self.routers))


class RouterSide:
    """How a router gets a step."""

    def __init__(self, me: int, page: Words) -> None:
        """me: a number that no other router has; page: its own."""
        self._me, self._page = me, page
        self._last = 0

    def ask(self, n_rows: int, conductor: Words, timeout_s: float) -> Step | None:
        """Agree on a step with up to `n_rows` rows of this router; None when the conductor does not answer."""
        page = self._page
        page[_ROWS] = n_rows
        page[_REQUEST] += 1
        step = _spin(lambda: self._mine(conductor), timeout_s)
        if step is None:
            page[_ROWS] = 0  # not wanted any more
            return None
        self._last = step.number
        step.write(page)
        return step

    def conducts(self, worker: int) -> None:
        """`worker`, by this router's number for it, says whom each step is for."""
        self._page[_CONDUCTOR] = worker + 1

    def is_ready(self, worker: Words, rests: bool) -> bool:
        """Whether a worker is ready for steps of this router; `rests`: and has nothing of an earlier one under way."""
        return self._me in worker[_READY : _READY + MAX_ROUTERS] and not (rests and int(worker[_ENDED]) < self._last)

    def _mine(self, conductor: Words) -> Step | None:
        step = Step.read(conductor)
        return step if step is not None and step.number > self._last and self._me in step.routers else None


class WorkerSide:
    """How a worker hears of steps, and the one that conducts makes them."""

    def __init__(self, page: Words) -> None:
        self._page = page
        self._served: dict[int, int] = {}  # by router: the request that got a step
        self._together: frozenset[int] = frozenset()  # routers of the last step
        self._gather_until = 0.0
        self.last = 0

    def conduct(self, routers: Mapping[int, Words], now: float) -> Step | None:
        """The next step, if a router wants one. Those that came out of the last step together are waited for a little,
        so that they go into the next together: their experts' weights are then read once."""
        wanting = {
            router: page
            for router, page in routers.items()
            if page[_ROWS] and page[_REQUEST] > self._served.get(router, 0)
        }
        if not wanting:
            self._gather_until = 0.0
            return None
        self._gather_until = self._gather_until or now + _GATHER_S
        if self._together & routers.keys() - wanting.keys() and now < self._gather_until:
            return None
        self._gather_until = 0.0
        for router, page in wanting.items():
            self._served[router] = int(page[_REQUEST])
        self._together = frozenset(wanting)
        step = Step(self.last + 1, max(int(page[_ROWS]) for page in wanting.values()), tuple(sorted(wanting)))
        self.last = step.number
        step.write(self._page)
        return step

    @staticmethod
    def is_conductor(router: Words, me: int) -> bool:
        """Whether a router says that this worker conducts, which it calls `me`."""
        return int(router[_CONDUCTOR]) == me + 1

    def follow(self, routers: Mapping[int, Words]) -> Step | None:
        """The next step, if a router has repeated one: the oldest that is new."""
        steps = [step for page in routers.values() if (step := Step.read(page)) is not None and step.number > self.last]
        if not steps:
            return None
        step = min(steps)
        self.last = step.number
        return step

    def joined(self, router: int, page: Words) -> None:
        """A router came: what it asked for before is another's business, and steps go on from the newest it knows."""
        self._served[router] = int(page[_REQUEST])
        known = Step.read(page)
        if known is not None:
            self.last = max(self.last, known.number)
        self._page[_ENDED] = self.last

    def ready(self, routers: Iterable[int]) -> None:
        """Steps of these routers can be computed here."""
        ready = [*routers][:MAX_ROUTERS]
        self._page[_READY : _READY + MAX_ROUTERS] = ready + [0] * (MAX_ROUTERS - len(ready))

    def ended(self, step: int, is_void: bool) -> None:
        """This worker has nothing under way any more that belongs to `step` or one before."""
        self._page[_VOID] = is_void
        self._page[_ENDED] = step


def _spin(found: Callable[[], Step | None], timeout_s: float) -> Step | None:
    """What `found` gives, as soon as it gives something; None when that takes too long."""
    end = time.monotonic() + timeout_s
    for n in count():
        if (result := found()) is not None:
            return result
        if n > _SPINS:
            time.sleep(0.00005)
            if time.monotonic() > end:
                break
    return None
