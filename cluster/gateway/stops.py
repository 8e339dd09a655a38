"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = borders[length - 1]
        length += stop[i] == stop[length]
        borders[i] = length
    return borders


class StopFinder:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one.

    The first is the one that is complete first, so the result does not depend on how the text was cut into pieces.
    Knuth-Morris-Pratt: a character costs the same however long the stop strings are.
    """

    __slots__ = ("_firsts", "_held", "_lengths", "_stops", "matched")

    def __init__(self, stops: Sequence[str]):
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._firsts = frozenset(stop[0] for stop in stops)
        self._lengths = [0] * len(stops)  # how much of each stop string the text now ends with
        self._held = ""
        self.matched = ""  # the stop string that was found

    def push(self, text: str) -> str:
        """The text that is safe to show now that `text` has come; when `matched`, what is left before the stop."""
        if not self._held and self._firsts.isdisjoint(text):
            return text
        held = len(self._held)
        text = self._held + text
        for end in range(held + 1, len(text) + 1):
            longest = self._advance(text[end - 1])
            if longest:
                self.matched, self._held = text[end - longest : end], ""
                return text[: end - longest]
        keep = len(text) - max(self._lengths)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        text, self._held = self._held, ""
        return text

    def _advance(self, character: str) -> int:
        """Take one character; the length of the longest stop string that it completes, or 0."""
        complete = 0
        for i, (stop, borders) in enumerate(self._stops):
            length = self._lengths[i]
            while length and stop[length] != character:
                length = borders[length - 1]
            length += stop[length] == character
            if length == len(stop):
                complete = max(complete, length)
                length = 0
            self._lengths[i] = length
        return complete
