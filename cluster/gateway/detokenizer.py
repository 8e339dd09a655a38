"""Token ids to text, one token at a time.

The text of a token does not depend on its neighbours in the tokenizers that matter (byte-level BPE, and BPE of the
SentencePiece kind), except that a character may be spread over several tokens and that a first space may be dropped.
So a table of pieces, made once, and a UTF-8 decoder that keeps incomplete bytes are all that a stream needs: the cost
of a token does not grow with the text before it.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

from cluster.errors import CheckpointError

Piece = Callable[[str], bytes]
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, every other byte for 256, 257, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level() -> Piece:
    bytes_of = _byte_of_character()

    def piece(token: str) -> bytes:
        try:
            return bytes([bytes_of[c] for c in token])
        except KeyError:  # an added token, which is not written in the alphabet
            return token.encode()

    return piece


def _sentence_piece(replacements: list[tuple[str, str]], byte_fallback: bool) -> Piece:
    def piece(token: str) -> bytes:
        if byte_fallback and _BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return piece


def piece_rule(decoder: Mapping[str, Any] | None) -> tuple[Piece, bool]:
    """How the `decoder` of a tokenizer.json spells one token, and whether it drops a text's first space.

    Raises CheckpointError for a decoder whose text of a token depends on its neighbours (WordPiece, CTC).
    """
    if decoder is None:  # tokens are whole words
        return (lambda token: b" " + token.encode()), True
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    replacements: list[tuple[str, str]] = []
    byte_fallback = strips = False
    for step in steps:
        match step["type"]:
            case "ByteLevel":
                return _byte_level(), False
            case "Metaspace":
                replacements.append((step.get("replacement", "▁"), " "))
                strips = step.get("prepend_scheme", "always") != "never"
            case "Replace" if "String" in step["pattern"]:
                replacements.append((step["pattern"]["String"], step["content"]))
            case "ByteFallback":
                byte_fallback = True
            case "Strip" if step["content"] == " " and step["start"] == 1 and step["stop"] == 0:
                strips = True
            case "Fuse":
                pass
            case other:
                raise CheckpointError(f"tokenizer.json: the decoder {other} is not supported")
    return _sentence_piece(replacements, byte_fallback), strips


class Pieces:
    """The bytes of every token of a vocabulary.

    `raw[id]` are the token's bytes; `shown[id]` its text in an answer: "" for a special token, None where the bytes
    are no whole characters. Ids that the vocabulary lacks (padding of the embedding) are empty. `single_bytes` are the
    ids that spell what no other token does, byte by byte (byte fallback).
    """

    def __init__(self, vocabulary: Mapping[str, int], special: Iterable[int], decoder: Mapping[str, Any] | None):
        spell, self.strips_first_space = piece_rule(decoder)
        size = max(vocabulary.values(), default=-1) + 1
        self.raw: list[bytes] = [b""] * size
        for token, token_id in vocabulary.items():
            self.raw[token_id] = spell(token)
        self.single_bytes = frozenset(i for token, i in vocabulary.items() if _BYTE.fullmatch(token))
        self.shown: list[str | None] = [_whole(piece) for piece in self.raw]
        for token_id in special:
            self.shown[token_id] = ""

    @cached_property
    def with_special(self) -> list[str | None]:
        """`shown`, but special tokens by their names."""
        return [_whole(piece) for piece in self.raw]

    def bytes_of(self, token_id: int) -> bytes:
        return self.raw[token_id] if token_id < len(self.raw) else b""


def _whole(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


class Detokenizer:
    """The text of one sequence, as its tokens come.

    `after_text`: the tokens go on after a text, as in a completion, so that their first space counts. Else they
    begin an answer, and a tokenizer that puts a space before every first word has it dropped. `special`: special tokens
    have text too.
    """

    __slots__ = ("_decoder", "_pieces", "_shown", "_size", "_strip")

    def __init__(self, pieces: Pieces, *, after_text: bool = False, special: bool = False):
        self._pieces = pieces
        self._shown = pieces.with_special if special else pieces.shown
        self._size = len(pieces.shown)
        self._strip = pieces.strips_first_space and not after_text
        self._decoder: codecs.IncrementalDecoder | None = None  # only while bytes of a character are missing

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes; "" while one is incomplete."""
        text = self._shown[token_id] if token_id < self._size else ""
        if text == "":
            return ""
        if text is None or self._decoder is not None:
            text = self._decode(self._pieces.raw[token_id])
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """What is left at the end: the replacement character if the last one stayed incomplete."""
        if self._decoder is None:
            return ""
        text, self._decoder = self._decoder.decode(b"", final=True), None
        return text

    def _decode(self, piece: bytes) -> str:
        if self._decoder is None:
            self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = self._decoder.decode(piece)
        if not self._decoder.getstate()[0]:
            self._decoder = None
        return text
