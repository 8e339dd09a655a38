"""Names and numbers of tokens in log-probabilities."""

from __future__ import annotations

import math
from copy import copy
from functools import cached_property
from typing import Any

from cluster.gateway.detokenizer import Pieces

LEAST = -9999.0  # what OpenAI writes for "very unlikely"; JSON has no minus infinity


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST


class TokenNames:
    """A name for every token, no two alike: answers list alternatives by name, and one that shares it would be lost.

    A token's name is its text, or `bytes:` and its values where it is no whole characters or another token has that
    text, or `token_id:` and its number where even that is taken or it stands for nothing.
    """

    def __init__(self, pieces: Pieces):
        self._raw = pieces.raw
        self._own: dict[int, str] = {}  # names that are not simply the token's text or bytes
        taken: set[str] = set()
        # Bytes of a fallback leave the name to the token that was learnt.
        for token_id in sorted(range(len(pieces.raw)), key=pieces.single_bytes.__contains__):
            raw = pieces.raw[token_id]
            plain = _text(raw)
            name = next(name for name in (plain, _values(raw), f"token_id:{token_id}") if name and name not in taken)
            taken.add(name)
            if name != plain:
                self._own[token_id] = name

    def name(self, token_id: int) -> str:
        """The one name of a token; of an id that no token has, `token_id:` and its number."""
        if (own := self._own.get(token_id)) is not None:
            return own
        return _text(self._raw[token_id]) if token_id < len(self._raw) else f"token_id:{token_id}"

    @cached_property
    def by_id(self) -> TokenNames:
        """The same tokens with `token_id:` and their number for every name."""
        names = copy(self)
        names._own = {token_id: f"token_id:{token_id}" for token_id in range(len(self._raw))}
        return names

    def named(self, token_id: int, logprob: float) -> dict[str, Any]:
        """A token as chat completions list it: name, log-probability, and the bytes it stands for."""
        raw = self._raw[token_id] if token_id < len(self._raw) else b""
        return {"token": self.name(token_id), "logprob": finite(logprob), "bytes": list(raw)}


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return _values(raw)


def _values(raw: bytes) -> str:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if raw else ""
