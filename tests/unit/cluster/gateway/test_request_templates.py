"""Would catch: a template of a request that is taken without being trusted, that stops the gateway, or whose failure is
not told; a name of the model's own templates that is taken for a template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.unit.cluster.gateway.fake_gateway import Served, serve
from tests.unit.cluster.gateway.scripted import CALL, prompt, say

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def several_path(byte_level_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with three templates."""
    path = tmp_path_factory.mktemp("several")
    for file in byte_level_path.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "tokenizer_config.json").read_text())
    bodies = {"default": "D", "tool_use": "T<tool_call>{{ tools | tojson }}", "rag": "R{{ documents | length }}"}
    ends = "{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    config["chat_template"] = [{"name": name, "template": body + ends} for name, body in bodies.items()]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def trusting(several_path: Path) -> Iterator[Served]:
    with serve(several_path, max_context=2000, trust_request_chat_template=True) as served:
        yield served


def ask(served: Served, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [USER], "max_tokens": 2} | more
    served.session.reset()
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)


@pytest.mark.parametrize(
    ("more", "expected"),
    [({}, "DHi>"), ({"tools": [TOOL]}, "T<tool_call>"), ({"tools": [TOOL], "tool_choice": "none"}, "DHi>"),
     ({"chat_template": "rag", "documents": [{}, {}]}, "R2Hi>"), ({"chat_template": None}, "DHi>"),
     ({"chat_template": "default", "tools": [TOOL]}, "DHi>"),
     ({"chat_template_kwargs": {"add_generation_prompt": False}}, "DHi"),
     ({"chat_template": "X{{ messages[0].role }}{{ bos_token }}"}, "Xuser<|im_start|>"),
     ({"chat_template": "{{ a }}", "chat_template_kwargs": {"a": "b" * 9}}, "b" * 9)],
)  # fmt: skip
def test_the_template_that_is_meant_makes_the_prompt(trusting: Served, more: dict[str, Any], expected: str) -> None:
    assert ask(trusting, **more).status_code == 200
    assert prompt(trusting).startswith(expected)


@pytest.mark.parametrize(
    ("template", "why"),
    [("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "too long"),
     ("{{ 'a' * 10 ** 9 }}", "too much memory"), ("{% for", "fails"), ("{{ 1 / 0 }}", "fails"),
     ("{{ messages.__class__.__mro__ }}", "fails"), ("{{ raise_exception('no') }}", "no"),
     ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails")],
)  # fmt: skip
def test_a_template_that_is_no_good_costs_its_own_request_only(trusting: Served, template: str, why: str) -> None:
    refused = ask(trusting, chat_template=template)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "chat_template"
    assert why in refused.json()["error"]["message"]
    assert ask(trusting, chat_template="after {{ messages[0].content }}").status_code == 200


def test_templates_of_requests_are_refused_unless_trusted(served: Served) -> None:
    refused = ask(served, chat_template="{{ messages }}").json()["error"]
    assert refused["param"] == "chat_template" and "default" in refused["message"]


def test_names_that_other_fields_give_are_refused(served: Served) -> None:
    for name in ("messages", "tools", "self", "template"):
        refused = ask(served, chat_template_kwargs={name: []})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == f"chat_template_kwargs.{name}"


def test_tokenize_makes_the_same_prompt(trusting: Served) -> None:
    several: list[dict[str, Any]] = [{"tools": [TOOL]}, {"chat_template": "rag", "documents": [{}]},
                                     {"chat_template": "{{ bos_token }}a"}]  # fmt: skip
    for more in several:
        assert ask(trusting, **more).status_code == 200
        body = {"messages": [USER], "return_token_strs": True} | more
        tokens = httpx.post(f"{trusting.url}/tokenize", json=body).json()
        assert tokens["tokens"] == trusting.session.asked[-1][0]
        assert tokens["token_strs"] == [trusting.tokenizer.token(token) for token in tokens["tokens"]]


def test_invocations_are_chats_and_text_completions(served: Served) -> None:
    def invoke(**body: Any) -> httpx.Response:
        return httpx.post(f"{served.url}/invocations", json={"model": "tiny", "max_tokens": 2} | body)

    assert invoke(messages=[USER]).json()["object"] == "chat.completion"
    assert invoke(prompt="Hi").json()["object"] == "text_completion"
    assert invoke().json()["error"]["param"] == "prompt"
    assert invoke(messages=[USER, {"role": 1}]).json()["error"]["param"] == "messages[1].role"


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_reasoning_are_counted(byte_level_path: Path, tmp_path: Path, stream: bool) -> None:
    for file in byte_level_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1].content }}<think>\n")
    with serve(tmp_path, max_context=2000) as thinking:
        say(thinking, "The capital</think> of France")
        body: dict[str, Any] = {"model": "tiny", "messages": [USER], "stream": stream}
        body |= {"stream_options": {"include_usage": True}} if stream else {}
        answer = httpx.post(f"{thinking.url}/v1/chat/completions", json=body).text
        last = answer.split("data: ")[-2] if stream else answer
        usage = json.loads(last)["usage"]
        whole = len(thinking.tokenizer.encode("The capital", add_special_tokens=False))
        mark = len(thinking.tokenizer.encode("</think>", add_special_tokens=False))
        assert whole <= usage["completion_tokens_details"]["reasoning_tokens"] < whole + mark
        say(thinking, "</think>" + CALL)
        answered = httpx.post(f"{thinking.url}/v1/responses", json={"model": "tiny", "input": "Hi"}).json()
        assert answered["usage"]["output_tokens_details"]["reasoning_tokens"] < mark
