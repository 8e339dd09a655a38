"""Which router has the beginning of a prompt in its KV cache already."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

_STEP = 64  # tokens from one beginning of a prompt that has a name to the next; fewer are computed soon
_LONGEST = 16384  # tokens that are looked at: prompts that share so many are worth the same router
_MOST = 16384  # names remembered of each router, of a million tokens: more than most caches hold


def prefixes_of(prompt_ids: Sequence[int], salt: str) -> tuple[int, ...]:
    """Names of the prompt's beginnings, 64 tokens, 128 and so on, up to 16384: equal where all tokens and the salt are.

    A name that two share by chance sends a request to a router that lacks its beginning, and nothing worse.
    """
    names: list[int] = []
    name = hash(salt)
    for end in range(_STEP, min(len(prompt_ids), _LONGEST) + 1, _STEP):
        name = hash((name, tuple(prompt_ids[end - _STEP : end])))
        names.append(name)
    return tuple(names)


class SeenPrefixes:
    """Beginnings of the prompts that one router computed of late: it may have them still. Those not used for longest
    are forgotten first, as its cache does."""

    def __init__(self) -> None:
        self._names: OrderedDict[int, None] = OrderedDict()

    def add(self, names: Sequence[int]) -> None:
        """The router computes a prompt with these names (`prefixes_of`)."""
        for name in reversed(names):  # the end of a prompt is found again less often than its beginning
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > _MOST:
            self._names.popitem(last=False)

    def shared(self, names: Sequence[int]) -> int:
        """How many of `names`, from the first on, the router has seen."""
        return next((i for i, name in enumerate(names) if name not in self._names), len(names))
