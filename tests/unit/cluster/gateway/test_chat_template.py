"""Would catch a prompt that differs by a byte from what transformers renders from the same template.

The templates are ours, in the shapes that published ones have: what they test for, name, loop over and trim.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import CheckpointError
from cluster.gateway.tokenizer import Tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "Is 1 < 2 & 'so'?\n"}
ANSWERED = {"role": "assistant", "content": " Yes, naïvely. "}
TWICE = [ASKED, ANSWERED, {"role": "user", "content": "東京?"}]
ROLE = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"

SHAPES = {
    "chatml": "{% for m in messages %}" + ROLE + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "tools is not none": "{% if tools is not none %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "tools is defined": "{%- if not tools is defined %}{%- set tools = [] %}{%- endif %}{{ tools | tojson }}",
    "documents": "{{ documents is none }}{% for d in documents or [] %}{{ d.text }}{% endfor %}{{ messages | length }}",
    "separators": "{% for m in messages %}{{ m | tojson(separators=(',', ':')) }}\n{% endfor %}",
    "sorted keys": "{{ {'b': 1, 'a': messages[0].content} | tojson(sort_keys=True, indent=2) }}",
    "escapes": "{{ messages | tojson }}{{ messages[0].content | tojson(ensure_ascii=True) }}",
    "instruct": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}",
    "system first": "{%- if messages[0].role == 'system' %}"
    "{%- set system, messages = messages[0].content, messages[1:] %}"
    "{%- else %}{%- set system = 'none' %}{%- endif %}{{ system }}|{{ messages | map(attribute='role') | join(',') }}",
    "namespace": "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.last = m.role %}{% endfor %}{{ ns.n }}{{ ns.last }}",
    "line statements": "{% for m in messages %}\n    {% if m.role == 'user' %}\n\tU: {{ m.content }}\n    {% endif %}\n"
    "{% endfor %}\nend\n",
    "headers": "{% for m in messages %}"
    "{% set c = '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "macro": "{%- macro turn(m, first=false) -%}"
    "{{ '' if first else '\n' }}### {{ m.role | capitalize }}:\n{{ m.content }}"
    "{%- endmacro -%}{% for m in messages %}{{ turn(m, loop.first) }}{% endfor %}",
    "content parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}",
    "tool calls": "{% for m in messages %}{% if m.tool_calls is defined and m.tool_calls %}CALL{% endif %}"
    "{{ m.get('tool_call_id', '-') }}{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% endfor %}",
    "thinking": "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% for m in messages[::-1] %}{{ m.content.startswith(' ') }}{{ loop.revindex }}{% endfor %}",
    "unknown names": "{{ pad_token }}{{ nothing }}{{ tools_in_user_message is defined }}{{ unk_token }}"
    "{% if not add_generation_prompt is defined %}?{% endif %}",
    "dictionaries": "{% for m in messages %}{% for k, v in m.items() %}{{ k }}={{ v | string | length }};{% endfor %}"
    "{{ dict(m, role='x') | tojson }}{% endfor %}",
    "whitespace": "  {{- bos_token -}}  \n {% for m in messages -%}\n  {{ m.content }}\n{%- endfor +%}\n x \n",
    "filters": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}"
    "{{ (messages | last).content | upper | replace('?', '!') | indent(4, first=True) }}",
}


def reference(path: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers renders what is expected")
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(path))


def write(source: Path, path: Path, config: dict[str, Any], **files: str) -> Path:
    path.mkdir()
    (path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(own | config))
    for name, text in files.items():
        (path / name).write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("shape", SHAPES)
def test_rendered_byte_for_byte_as_transformers_does(shape: str, sentence_piece_path: Path, tmp_path: Path) -> None:
    path = write(sentence_piece_path, tmp_path / "model", {"chat_template": SHAPES[shape]})
    ours, theirs = Tokenizer(path), reference(path)
    for messages in ([ASKED], [SYSTEM, ASKED], TWICE, [SYSTEM, *TWICE]):
        for generate in (True, False):
            wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
            assert ours.apply_chat_template(messages, add_generation_prompt=generate) == wanted


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"chat_template": "config"}, {"chat_template.jinja": "file {{ eos_token }}\n"}),
        ({}, {"chat_template.jinja": "file"}),
        (
            {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d\n"}]},
            {},
        ),
        ({"chat_template": None}, {"chat_template.jinja": "file\r\n\r\n"}),
    ],
    ids=["beside the config", "alone", "a list of named ones", "of another system"],
)
def test_found_where_transformers_finds_it(
    config: dict[str, Any], files: dict[str, str], sentence_piece_path: Path, tmp_path: Path
) -> None:
    path = write(sentence_piece_path, tmp_path / "model", config, **files)
    wanted = reference(path).apply_chat_template([ASKED], tokenize=False)
    assert Tokenizer(path).apply_chat_template([ASKED], add_generation_prompt=False) == wanted


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ([{"template": "a"}, {"template": "b"}], "needs a `name`"),
        (["a"], "needs a `name`"),
        ([{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "t"}], "rag, tool_use; name the template"),
        ({"default": "a"}, "neither a text nor a list"),
    ],
)
def test_templates_that_cannot_be_told_apart_are_a_fault_of_their_file(
    template: object, message: str, sentence_piece_path: Path, tmp_path: Path
) -> None:
    path = write(sentence_piece_path, tmp_path / "model", {"chat_template": template})
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: .*{message}"):
        Tokenizer(path)


def test_a_template_in_another_encoding_is_a_fault_of_its_file(sentence_piece_path: Path, tmp_path: Path) -> None:
    path = write(sentence_piece_path, tmp_path / "model", {})
    (path / "chat_template.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        Tokenizer(path)
