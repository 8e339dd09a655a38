"""What the live page shows: one JSON document, and how it changes from one look at the cluster to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

_EVENTS = 200
_POINTS = 240  # of the sparklines: two minutes at two looks a second
_RATE_S = 5.0  # over which tokens per second are counted: the members say their numbers once a second

Json = dict[str, Any]


class Board:
    """The document. `update` and `away` change it and return the change.

    A change has the fields that differ, but `load`, `events` and `history`, of which it says what is new: `rows` by
    layer, `new_events`, `point`.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        """`facts`: what never changes, the model's name among it."""
        self._document: Json = dict(facts) | {
            "source": {"state": "waiting", "since": None},
            "events": [],
            "history": [],
        }
        self._tokens: deque[tuple[float, dict[str, int]]] = deque()

    @property
    def epoch(self) -> int:
        """Of the placement that is shown; 0: none yet."""
        return int(self._document.get("epoch", 0))

    @property
    def last_event(self) -> int:
        """Number of the newest event; 0: none yet."""
        events = self._document["events"]
        return int(events[-1]["number"]) if events else 0

    def snapshot(self) -> Json:
        """The whole document."""
        return self._document

    def update(self, seen: Mapping[str, Any], now: float) -> Json:
        """The controller has been asked; `now` in seconds of a clock that only goes forward."""
        fresh = dict(seen)
        placement = fresh.pop("placement")
        if placement is not None:
            fresh["placement"] = placement
        new_events, load = fresh.pop("events"), fresh.pop("load")
        fresh["source"] = {"state": "live", "since": None}
        change = self._put(fresh)
        change |= self._put_load(load)
        if new_events:
            self._document["events"] = [*self._document["events"], *new_events][-_EVENTS:]
            change["new_events"] = new_events
        point = self._point(fresh, now)
        self._document["history"] = [*self._document["history"], point][-_POINTS:]
        return change | {"point": point}

    def away(self, since: float) -> Json:
        """The controller does not answer, since then (seconds since 1970); what is shown stays."""
        return self._put({"source": {"state": "away", "since": since}})

    def _put(self, fresh: Mapping[str, Any]) -> Json:
        change = {name: value for name, value in fresh.items() if self._document.get(name, self) != value}
        self._document.update(change)
        return change

    def _put_load(self, load: list[list[int]] | None) -> Json:
        before = self._document.get("load")
        self._document["load"] = load
        if load is None or before is None or len(load) != len(before):
            return {} if load == before else {"load": load}
        rows = {str(i): row for i, (row, old) in enumerate(zip(load, before, strict=True)) if row != old}
        return {"rows": rows} if rows else {}

    def _point(self, seen: Mapping[str, Any], now: float) -> Json:
        """One point of every sparkline; what is not known is null."""
        gateways = {m["id"]: m["detail"] for m in seen["members"] if m["role"] == "gateway" and m["state"] != "lost"}
        return {
            "at": seen["at"],
            "tokens_per_s": self._rate({id: int(detail.get("tokens", 0)) for id, detail in gateways.items()}, now),
            "open": sum(int(detail.get("open", 0)) for detail in gateways.values()),
            "first_token_s": _slowest([detail.get("first_token_s") for detail in gateways.values()]),
            "next_token_s": _slowest([detail.get("next_token_s") for detail in gateways.values()]),
            "imbalance": seen["imbalance"],
        }

    def _rate(self, tokens: dict[str, int], now: float) -> float | None:
        """Tokens a second that all gateways gave; None after the first look."""
        self._tokens.append((now, tokens))
        while len(self._tokens) > 2 and now - self._tokens[1][0] >= _RATE_S:
            self._tokens.popleft()
        then, before = self._tokens[0]
        if now <= then:
            return None
        # One that is new, or counts anew, is left out until the next look.
        return sum(max(0, n - before.get(id, n)) for id, n in tokens.items()) / (now - then)


def _slowest(quantiles: list[tuple[float, float] | None]) -> list[float] | None:
    """Median and 95th percentile at the gateway where they are highest; None where nobody waited."""
    known = [each for each in quantiles if each is not None]
    return [max(each[0] for each in known), max(each[1] for each in known)] if known else None
