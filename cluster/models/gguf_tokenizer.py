"""A `tokenizer.json` from the vocabulary in a GGUF file (byte-level BPE, the `gpt2` kind)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import PreTokenizer

from cluster.errors import CheckpointError

_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF

# How text is cut before the merges, by `tokenizer.ggml.pre`.
_LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PLAIN = ("gpt-2", "gpt2")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe")


def build_tokenizer(path: Path, fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that the metadata `fields` of the GGUF file `path` describe.

    Raises CheckpointError when it is of another kind, or cuts text in a way that is not known here.
    """
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or "tokenizer.ggml.merges" not in fields:
        raise CheckpointError(f"{path}: unsupported tokenizer {kind!r}; supported: 'gpt2' (byte-level BPE)")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut in _LLAMA3))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: the tokenizer's merges do not fit its tokens: {error}") from None
    tokenizer.pre_tokenizer = _pre_tokenizer(path, cut)
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.get("tokenizer.ggml.token_type", [])
    for token, token_type in zip(tokens, types, strict=False):
        if token_type in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=token_type == _CONTROL, normalized=False)])
    if fields.get("tokenizer.ggml.add_bos_token") and "tokenizer.ggml.bos_token_id" in fields:
        bos_id = fields["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos_id]} $A", pair=f"{tokens[bos_id]} $A $B", special_tokens=[(tokens[bos_id], bos_id)]
        )
    return tokenizer


def _pre_tokenizer(path: Path, cut: str) -> PreTokenizer:
    if cut in _PLAIN:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if cut in _SINGLE_DIGITS:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if cut in _LLAMA3:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3_CUT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    known = ", ".join((*_PLAIN, *_SINGLE_DIGITS, *_LLAMA3))
    raise CheckpointError(f"{path}: unsupported `tokenizer.ggml.pre` {cut!r}; supported: {known}")
