"""Text to token ids and back, and messages to prompts, as a checkpoint directory says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from cluster.errors import CheckpointError, RequestError
from cluster.gateway.chat_template import ChatTemplate, Message
from cluster.gateway.detokenizer import Detokenizer, Pieces

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; {} where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: an object is expected")
    return value


class Tokenizer:
    """The tokenizer of the checkpoint directory `path`.

    Needs tokenizer.json; tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json and
    chat_template.jinja are read where they exist. Raises CheckpointError naming the file at fault.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: the tokenizer must be in the `tokenizers` format")
        definition = read_json(file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file}: {error}") from error
        # Some files carry the truncation and padding of a training run.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = read_json(self.path / "tokenizer_config.json")
        self.special_tokens = _special_tokens(read_json(self.path / "special_tokens_map.json"), config)
        added = self._tokenizer.get_added_tokens_decoder()
        self.pieces = Pieces(
            self._tokenizer.get_vocab(with_added_tokens=True),
            [token_id for token_id, token in added.items() if token.special],
            definition.get("decoder"),
        )
        self._template_source = _template_source(self.path, config)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return len(self.pieces.raw)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """The ids that end an answer: those of generation_config.json or config.json, and the tokenizer's own."""
        ids: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            value = read_json(self.path / name).get("eos_token_id")
            if value is not None:
                ids.update([value] if isinstance(value, int) else value)
                break
        own = self._tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        return frozenset(ids if own is None else ids | {own})

    @property
    def bos_id(self) -> int | None:
        token: int | None = self._tokenizer.token_to_id(self.special_tokens.get("bos_token", ""))
        return token

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`, with what the tokenizer puts around a text (usually a first token) if asked."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids that the vocabulary lacks are left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, *, after_text: bool = False, special: bool = False) -> Detokenizer:
        """For the tokens of one sequence as they come. `special`: special tokens are shown by their names."""
        return Detokenizer(self.pieces, after_text=after_text, special=special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, special tokens by their name; may be no whole character."""
        return self.pieces.bytes_of(token_id)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """None where the checkpoint has none, as base models do."""
        source = self._template_source
        return ChatTemplate(source, self.special_tokens) if source is not None else None

    def apply_chat_template(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; encode it with `add_special_tokens=False`, as it names its first token.

        Raises RequestError where the template refuses the messages, or where there is no template.
        """
        if self.chat_template is None:
            raise RequestError("This model has no chat template; use /v1/completions",
                               code="unsupported_endpoint", param="model")  # fmt: skip
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, the last source winning; a token is written as a string or as an object."""
    found: dict[str, str] = {}
    for source in sources:
        for name in _SPECIAL:
            value = source.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
    return found


def _template_source(path: Path, config: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = config.get("chat_template", read_json(path / "chat_template.json").get("chat_template"))
    if isinstance(source, list):  # several, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return source if isinstance(source, str) else None
