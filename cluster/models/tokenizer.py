"""A small real tokenizer, trained on our own text (byte-level BPE: any text can be encoded), and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.models import corpus
from cluster.models.writer import write_json

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
MIN_VOCABULARY = len(SPECIAL) + 256  # one token for each byte

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` with at most `vocab_size` tokens (>= MIN_VOCABULARY).

    Begin of sequence is id 1, end of a turn id 2. A large vocabulary stays partly unused: the text is short.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.read_all(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", tokenizer_config(SPECIAL[1], SPECIAL[2], CHAT_TEMPLATE))


def tokenizer_config(bos: str | None, eos: str | None, chat_template: str | None) -> dict[str, Any]:
    """The `tokenizer_config.json` beside a `tokenizer.json`."""
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "clean_up_tokenization_spaces": False,
    }
    return values | ({"chat_template": chat_template} if chat_template else {})
