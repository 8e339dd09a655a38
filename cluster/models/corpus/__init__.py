"""A few pages of our own text of three kinds: code, English, other languages."""

from __future__ import annotations

from importlib.resources import files


def read(kind: str) -> str:
    """The text of one kind: `code`, `english` or `languages`."""
    return (files(__name__) / f"{kind}.txt").read_text(encoding="utf-8")


def read_all() -> list[str]:
    """All kinds, one text each."""
    return [read(kind) for kind in ("code", "english", "languages")]
