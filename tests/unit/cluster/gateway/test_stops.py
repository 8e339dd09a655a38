"""Would catch: a part of a stop string that reaches the client, a stop string missed over a border, lost text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.stops import StopFinder

letters = st.text("ab", max_size=12)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, the longest if several are."""
    ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    return (text[: sum(min(ends))], True) if ends else (text, False)


@given(st.lists(letters, max_size=6), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_cut_does_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    shown = ""
    for piece in pieces:
        shown += finder.push(piece)
        if finder.matched:
            break
    shown += finder.flush()
    assert (shown, bool(finder.matched)) == expected("".join(pieces), stops)


def test_what_looked_like_a_stop_string_and_was_none_is_shown() -> None:
    finder = StopFinder(["STOP"])
    assert [finder.push(piece) for piece in ("a S", "TO", "x")] == ["a ", "", "STOx"]
    assert finder.push("ST") == ""
    assert finder.flush() == "ST"
