"""A dense Llama-architecture checkpoint, wherever it comes from, in the words of a Hugging Face Llama."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from cluster.errors import CheckpointError
from workers.families.config import read_json
from workers.families.registry import spec_of
from workers.families.tensors import Shape
from workers.spec import ModelSpec
from workers.tensor_store import TensorStore

# What goes along unchanged: the tokenizer in all its forms, the chat template, the generation defaults.
CARRIED_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip

_FAMILIES = ("llama", "mistral")  # with a Mixtral's arithmetic


@dataclass(frozen=True, slots=True)
class DenseSource:
    """A dense model to upcycle."""

    origin: Path  # for messages
    spec: ModelSpec
    read: Callable[[str, Shape], Tensor]  # a tensor by its Hugging Face Llama name; raises CheckpointError
    tokenizer: Tokenizer
    carry: Callable[[Path], None]  # writes tokenizer, chat template and generation defaults to a directory


def from_directory(directory: Path) -> DenseSource:
    """A Hugging Face directory. Raises CheckpointError when it is not a Llama whose arithmetic a Mixtral shares."""
    path = directory / "config.json"
    values = read_json(path)
    kind = values.get("model_type")
    if kind not in _FAMILIES:
        raise CheckpointError(f"{path}: cannot upcycle architecture {kind!r}; supported: {', '.join(_FAMILIES)}")
    store = TensorStore(directory)

    def carry(dest: Path) -> None:
        for name in CARRIED_FILES:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, dest / name)

    return DenseSource(
        origin=directory,
        spec=spec_of(values, path),
        read=store.read,
        tokenizer=_load_tokenizer(directory / "tokenizer.json"),
        carry=carry,
    )


def _load_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; the gates are fitted to text, which takes the tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: cannot be read as a tokenizer: {error}") from None
