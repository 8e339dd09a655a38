"""Text to token ids and back, and messages to prompts, as a checkpoint directory says."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from cluster.errors import CheckpointError, RequestError
from cluster.gateway.chat_template import ChatTemplate, Message
from cluster.gateway.detokenizer import Detokenizer, Pieces
from cluster.gateway.parsers.formats import tool_format_of

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
        definition = _untrimmed(read_json(file))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
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
        self._templates = _template_sources(self.path, config)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return len(self.pieces.raw)

    def tokens_from(self, first: int) -> dict[int, str]:
        """The tokens of `first` and the ids above, as the vocabulary writes them."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        return {token_id: token for token, token_id in vocabulary.items() if token_id >= first}

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """The ids that end an answer: those of generation_config.json or config.json, and the tokenizer's own.

        A model may have no row for some of them (`cluster.gateway.vocabulary`): it never says those.
        """
        ids: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            value = read_json(self.path / name).get("eos_token_id")
            if value is not None:
                ids.update([value] if isinstance(value, int) else value)
                break
        own = self._tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        return frozenset(ids if own is None else ids | {own})

    def token(self, token_id: int) -> str:
        """A token as the vocabulary writes it, which is not its text: `Ġthe`; "" where it has none of that id."""
        return self._tokenizer.id_to_token(token_id) or ""

    @property
    def bos_id(self) -> int | None:
        token: int | None = self._tokenizer.token_to_id(self.special_tokens.get("bos_token", ""))
        return token

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`, with what the tokenizer puts around a text (usually a first token) if asked."""
        # encode_batch gives the GIL away, encode does not: a long text is encoded beside the event loop.
        ids: list[int] = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each of `texts`, with nothing around them."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def offsets(self, text: str) -> list[int]:
        """Where in `text`, in characters, each token of it begins; what the tokenizer adds lies where it was added."""
        encoding = self._tokenizer.encode(text)
        starts: list[int] = []
        end = 0
        for (start, stop), added in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
            starts.append(end if added and start == stop else max(start, starts[-1] if starts else 0))
            end = max(end, stop)
        return starts

    def spell(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """The text of `ids`, special tokens by their names, and where in it, in characters, each of them begins."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, offsets = "", []
        for token_id in ids:
            raw = self.pieces.bytes_of(token_id)
            if raw and raw[0] & 0xC0 != 0x80:  # no continuation: a character before it that is incomplete stays so
                text += decoder.decode(b"", final=True)
            offsets.append(len(text))
            text += decoder.decode(raw)
        text += decoder.decode(b"", final=True)
        if self.pieces.strips_first_space and text.startswith(" "):
            return text[1:], [max(offset - 1, 0) for offset in offsets]
        return text, offsets

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids that the vocabulary lacks are left out."""
        # decode_batch gives the GIL away, as encode_batch does.
        text: str = self._tokenizer.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]
        return text

    def detokenizer(self, *, after_text: bool = False, special: bool = False) -> Detokenizer:
        """For the tokens of one sequence as they come. `special`: special tokens are shown by their names."""
        return Detokenizer(self.pieces, after_text=after_text, special=special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, special tokens by their name; may be no whole character."""
        return self.pieces.bytes_of(token_id)

    @cached_property
    def chat_templates(self) -> dict[str, ChatTemplate]:
        """By name; `default` is for chats, `tool_use`, if there is one, for those with tools.

        Empty where the checkpoint has none, as base models do."""
        return {name: ChatTemplate(source, self.special_tokens) for name, source in self._templates.items()}

    def template_for(self, *, tools: bool) -> str:
        """The name of the template for a conversation with or without tools."""
        return "tool_use" if tools and "tool_use" in self._templates else "default"

    @property
    def tool_format(self) -> str | None:
        """How the chat template teaches the model to call functions; None: it does not."""
        return tool_format_of(self._templates.get(self.template_for(tools=True), ""))

    def special_id(self, text: str) -> int | None:
        """The special token that is written as `text`."""
        token: int | None = self._tokenizer.token_to_id(text) if text else None
        return None if token is None or self.pieces.shown[token] else token

    def teaches(self, mark: str) -> bool:
        """Whether the chat template holds `mark`."""
        return any(mark in source for source in self._templates.values())

    @cached_property
    def longest_piece(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self.pieces.raw), default=0)

    def info(self) -> dict[str, Any]:
        """What a client may want to know of it."""
        return read_json(self.path / "tokenizer_config.json") | {
            "vocab_size": self.vocab_size,
            "chat_template": self._templates.get("default"),
            "special_tokens": self.special_tokens,
            "eos_token_ids": sorted(self.eos_ids),
        }

    def apply_chat_template(self, messages: Sequence[Message], template: str | None = None, **extra: Any) -> str:
        """The prompt of a conversation; encode it with `add_special_tokens=False`, as it names its first token.

        `template`: the name of one of several; default: the one for its tools. Raises RequestError where the template
        refuses the messages, or where there is no template.
        """
        if not self.chat_templates:
            raise RequestError("This model has no chat template; use /v1/completions",
                               code="unsupported_endpoint", param="model")  # fmt: skip
        name = template or self.template_for(tools=extra.get("tools") is not None)
        return self.chat_templates[name].render(messages, **extra)


def _untrimmed(definition: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, in whose offsets a token's white space is a part of it, as it is of its text."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: False if key == "trim_offsets" else without(inner) for key, inner in value.items()}
        return [without(inner) for inner in value] if isinstance(value, list) else value

    return definition | {key: without(definition[key]) for key in ("post_processor",) if key in definition}


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


def _template_sources(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """By name. The one for chats, `default`, is in chat_template.jinja, else in tokenizer_config.json, else in
    chat_template.json; others are in the directory additional_chat_templates, or beside it in a list."""
    files = {"default": path / "chat_template.jinja"} if (path / "chat_template.jinja").is_file() else {}
    if files:
        files |= {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
        return {name: _read_text(file) for name, file in files.items()}
    file, source = path / "tokenizer_config.json", config.get("chat_template")
    if source is None:
        file = path / "chat_template.json"
        source = read_json(file).get("chat_template")
    if source is None:
        return {}
    if isinstance(source, list):
        return _named(source, file)
    if not isinstance(source, str):
        raise CheckpointError(f"{file}: chat_template is neither a text nor a list of named ones")
    return {"default": source}


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _named(templates: list[Any], file: Path) -> dict[str, str]:
    """Several templates by name, one of which is `default`."""
    named: dict[str, str] = {}
    for entry in templates:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise CheckpointError(f"{file}: each of several templates in chat_template needs a `name` and a `template`")
        named[name] = text
    if "default" not in named:
        names = ", ".join(named) or "nothing"
        raise CheckpointError(f"{file}: chat_template has {names}; name the template for chats `default`")
    return named
