"""Would catch: prompts that differ from the model's own template, a template that escapes its sandbox, wrong ends."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest

from cluster.errors import CheckpointError, RequestError
from cluster.gateway.chat_template import ChatTemplate
from cluster.gateway.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello"}]


def test_chatml_is_rendered_as_smollm2_was_trained(byte_level_path: Path) -> None:
    tokenizer = Tokenizer(byte_level_path)
    prompt = tokenizer.apply_chat_template(HELLO)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert ids.count(1) == 3 and ids.count(2) == 2


def test_instruct_is_rendered_as_mixtral_was_trained(sentence_piece_path: Path) -> None:
    tokenizer = Tokenizer(sentence_piece_path)
    messages = [*HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Bye"}]
    assert tokenizer.apply_chat_template(messages) == "<s> [INST] Hello [/INST] Hi</s> [INST] Bye [/INST]"
    assert tokenizer.encode("Paris")[0] == tokenizer.bos_id == 1
    assert 1 not in tokenizer.encode("Paris", add_special_tokens=False)


def test_messages_that_the_template_refuses_are_the_clients_fault(sentence_piece_path: Path) -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        Tokenizer(sentence_piece_path).apply_chat_template(HELLO * 2)
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ x.y }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(RequestError):
        ChatTemplate(source, {}).render(HELLO)


def test_what_templates_in_the_wild_use_is_there() -> None:
    template = ChatTemplate(
        "{{ strftime_now('%Y') }}{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}"
        "{% break %}{% endfor %}",
        {},
        now=lambda: datetime(2031, 1, 1),
    )
    assert template.render([{"role": "user", "content": "<é>"}]) == '2031{"role": "user", "content": "<é>"}'


def test_a_broken_template_is_a_broken_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate("{% if %}", {})


def test_a_model_without_template_says_so(byte_level_path: Path, tmp_path: Path) -> None:
    shutil.copy(byte_level_path / "tokenizer.json", tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_ids == frozenset()
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat_template(HELLO)


def test_ends_come_from_the_generation_config_and_the_tokenizer(byte_level_path: Path, tmp_path: Path) -> None:
    assert Tokenizer(byte_level_path).eos_ids == {0, 2}
    shutil.copytree(byte_level_path, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").unlink()
    (tmp_path / "m" / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer(tmp_path / "m").eos_ids == {7, 2}


def test_the_template_is_found_wherever_checkpoints_keep_it(byte_level_path: Path, tmp_path: Path) -> None:
    shutil.copy(byte_level_path / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}, "chat_template": [{"name": "default", "template": "list"}]})
    )
    assert Tokenizer(tmp_path).apply_chat_template(HELLO) == "list"
    assert Tokenizer(tmp_path).special_tokens == {"eos_token": "<|im_end|>"}
    (tmp_path / "chat_template.jinja").write_text("file{{ eos_token }}")
    assert Tokenizer(tmp_path).apply_chat_template(HELLO) == "file<|im_end|>"


def test_truncation_that_was_saved_with_a_tokenizer_is_not_applied(byte_level_path: Path, tmp_path: Path) -> None:
    definition = json.loads((byte_level_path / "tokenizer.json").read_text())
    definition["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    assert len(Tokenizer(tmp_path).encode("The capital of France")) > 2


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
