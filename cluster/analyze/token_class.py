"""What kind of thing a token is, by how it is written: the same for any language and any tokenizer."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CLASSES = ("word", "capitalised", "continuation", "number", "punctuation", "symbol", "space", "other")


def token_classes(pieces: Sequence[bytes]) -> NDArray[np.int64]:
    """The class of each token of a text, as its place in CLASSES.

    pieces: the bytes of each token, in order. A word begins after a space or anything but a letter or digit; what goes
    on with it is a continuation. Bytes that are no whole character are `other`.
    """
    classes = np.zeros(len(pieces), np.int64)
    inside = False  # whether the text so far ends within a word
    for i, piece in enumerate(pieces):
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            classes[i] = CLASSES.index("other")
            continue
        classes[i] = CLASSES.index(_class(text, inside))
        inside = text[-1:].isalnum()
    return classes


def _class(text: str, inside: bool) -> str:
    core = text.strip()
    if not core:
        return "space" if text else "other"
    first = core[0]
    if first.isdigit():
        return "number"
    if first.isalpha():
        if inside and not text[0].isspace():
            return "continuation"
        return "capitalised" if first.isupper() else "word"
    kind = unicodedata.category(first)[0]
    if kind == "M":  # goes on with the letter before it
        return "continuation"
    return {"P": "punctuation", "S": "symbol"}.get(kind, "other")
