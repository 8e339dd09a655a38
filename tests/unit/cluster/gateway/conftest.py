"""Small tokenizers of the two kinds, in directories as a checkpoint has them; a gateway without a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.unit.cluster.gateway.fake_gateway import Served, serve

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INSTRUCT = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ ' [INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
CORPUS = [
    "The capital of France is Paris. It lies on the Seine.",
    "def f(x):\n    return x + 1\n",
    "naïve café, über, 東京 🙂",
]


def save(path: Path, tokenizer: tokenizers.Tokenizer, template: str, **special: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} | special))
    return path


@pytest.fixture(scope="session")
def byte_level_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As SmolLM2's: byte-level BPE, ChatML, an end-of-text and an end-of-turn token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    path = tmp_path_factory.mktemp("byte_level")
    save(path, tokenizer, CHATML, bos_token="<|im_start|>", eos_token="<|im_end|>")
    (path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    return path


@pytest.fixture(scope="session")
def sentence_piece_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Mixtral's: BPE over words that begin with a low line, bytes as a fallback, <s> before every text."""
    words = ["▁", "▁The", "▁cap", "ital", "▁of", "▁France", "▁Paris", "P", "a", "r", "i", "s", ".", ",", "▁is", "h"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    vocabulary |= {word: len(vocabulary) + i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return save(tmp_path_factory.mktemp("sentence_piece"), tokenizer, INSTRUCT, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def _served(byte_level_path: Path) -> Iterator[Served]:
    with serve(byte_level_path, max_body_bytes=100_000) as served:
        yield served


@pytest.fixture(scope="session")
def _roomy(byte_level_path: Path) -> Iterator[Served]:
    with serve(byte_level_path, max_context=2000) as served:
        yield served


@pytest.fixture
def served(_served: Served) -> Iterator[Served]:
    """The gateway most tests use; its session as new."""
    yield from _as_new(_served)


@pytest.fixture
def roomy(_roomy: Served) -> Iterator[Served]:
    """A gateway with room for prompts that tell of tools; its template knows nothing of them. Its session as new."""
    yield from _as_new(_roomy)


def _as_new(served: Served) -> Iterator[Served]:
    script = served.session.script
    served.session.reset()
    yield served
    served.session.script = script
