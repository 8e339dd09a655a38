"""Tools and structured output through OpenAI's client.

Catches: a call that the client does not understand, streamed or whole; a request whose tools do not reach the template,
or whose grammar does not reach the router.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import BaseModel
from tokenizers import Tokenizer

from tests.unit.cluster.gateway.fake_gateway import Served, serve
from tests.unit.cluster.gateway.scripted import CALL, prompt, say

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
USER: Any = {"role": "user", "content": "Weather in Paris?"}
TEMPLATE = (
    "{% if tools %}<tool_call> {{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}"
    "[{{ call.function.name }} {{ call.function.arguments.city }} {{ call.id }}]{% endfor %}"
    "{% if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def teaching(byte_level_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model whose template knows tools."""
    path = tmp_path_factory.mktemp("teaching")
    for file in byte_level_path.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "chat_template.jinja").write_text(TEMPLATE)
    with serve(path, max_context=2000) as served:
        yield served


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_calls(roomy: Served, teaching: Served, knows: bool, stream: bool) -> None:
    server = teaching if knows else roomy
    say(server, f"Let me see. {CALL}\n{CALL}")
    asked: Any = {"model": "tiny", "messages": [USER], "tools": [WEATHER], "max_tokens": 150}
    if stream:
        with server.client().chat.completions.stream(**asked) as events:
            for _ in events:
                pass
            choice = events.get_final_completion().choices[0]
    else:
        choice = server.client().chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see. "
    calls: Any = choice.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("weather", {"city": "Paris"})
    ] * 2
    assert len({call.id for call in calls}) == 2
    assert "The weather of a city" in prompt(server)


def test_calls_and_results_go_back_into_the_prompt(teaching: Served) -> None:
    say(teaching, "Sunny.")
    call = {"id": "abc", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages: Any = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc", "content": "sunny"},
    ]
    answer = teaching.client().chat.completions.create(model="tiny", messages=messages, tools=[WEATHER])
    assert answer.choices[0].message.content == "Sunny." and answer.choices[0].finish_reason == "stop"
    assert "assistant: [weather Paris abc]" in prompt(teaching) and "tool: sunny(abc)" in prompt(teaching)


def test_a_call_may_be_required_named_or_forbidden(teaching: Served) -> None:
    client = teaching.client()
    say(teaching, '[{"name": "weather", "parameters": {"city": "Paris"}}]')
    asked: Any = {"model": "tiny", "messages": [USER], "tools": [WEATHER], "max_tokens": 150}
    choice = client.chat.completions.create(**asked, tool_choice="required").choices[0]
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Paris"}' and choice.message.content is None
    assert "maxItems" not in teaching.session.asked[-1][1].grammar
    client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False)
    assert "maxItems" in teaching.session.asked[-1][1].grammar
    say(teaching, '{"city": "Rome"}')
    named: Any = {"type": "function", "function": {"name": "weather"}}
    choice = client.chat.completions.create(**asked, tool_choice=named).choices[0]
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Rome"}' and choice.finish_reason == "stop"
    say(teaching, CALL)
    choice = client.chat.completions.create(**asked, tool_choice="none").choices[0]
    assert choice.message.content == CALL and choice.message.tool_calls is None and "tool_call" not in prompt(teaching)


def test_a_model_may_call_before_it_answers_in_a_format(teaching: Served) -> None:
    """Would catch a format that shuts out calls, and one that is refused beside a call that is required."""
    asked: Any = {"model": "tiny", "messages": [USER], "tools": [WEATHER], "max_tokens": 150}
    asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "City", "schema": CITY}}
    say(teaching, CALL)
    choice = teaching.client().chat.completions.create(**asked).choices[0]
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Paris"}'
    grammar = teaching.session.asked[-1][1].grammar
    for text, follows in {CALL: True, f"{CALL}\n{CALL}": True, '{"name": "Paris"}': True, "Sunny.": False}.items():
        assert accepts(teaching, grammar, text) == follows, text
    teaching.client().chat.completions.create(**asked, parallel_tool_calls=False)
    assert not accepts(teaching, teaching.session.asked[-1][1].grammar, f"{CALL}\n{CALL}")
    say(teaching, '[{"name": "weather", "parameters": {"city": "Paris"}}]')
    choice = teaching.client().chat.completions.create(**asked, tool_choice="required").choices[0]
    assert choice.message.tool_calls[0].function.name == "weather"
    assert not accepts(teaching, teaching.session.asked[-1][1].grammar, '{"name": "Paris"}')


@pytest.mark.parametrize(
    ("form", "call"),
    [
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}}]'),
        ("llama3_json", '{"name": "weather", "parameters": {"city": "Paris"}}'),
    ],
)
def test_a_parser_chosen_beside_a_template_of_another_format(
    byte_level_path: Path, tmp_path: Path, form: Any, call: str
) -> None:
    """Would catch a special mark that is not shown, a prompt that teaches another format, and an answer in JSON that is
    taken for a call."""
    tokenizer = Tokenizer.from_file(str(byte_level_path / "tokenizer.json"))
    tokenizer.add_special_tokens(["[TOOL_CALLS]"])
    for file in byte_level_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    asked: Any = {"model": "tiny", "messages": [USER], "tools": [WEATHER], "max_tokens": 150}
    with serve(tmp_path, max_context=2000, tool_call_parser=form) as served:
        say(served, call)
        choice = served.client().chat.completions.create(**asked).choices[0]
        assert choice.message.tool_calls[0].function.arguments == '{"city": "Paris"}' and not choice.message.content
        assert call[:14] in prompt(served)
        asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "City", "schema": CITY}}
        served.client().chat.completions.create(**asked)
        grammar = served.session.asked[-1][1].grammar
        assert accepts(served, grammar, call) and accepts(served, grammar, '{"name": "Paris"}')
        say(served, '{"name": "Paris"}')
        assert served.client().chat.completions.create(**asked).choices[0].message.content == '{"name": "Paris"}'


def test_the_older_functions(teaching: Served) -> None:
    say(teaching, CALL)
    asked: Any = {"model": "tiny", "messages": [USER], "functions": [WEATHER["function"]], "max_tokens": 150}
    choice = teaching.client().chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "function_call" and choice.message.function_call.name == "weather"


CITY = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}


TAG: dict[str, Any] = {"structures": [{"begin": "<f=city>", "schema": CITY, "end": "</f>"}], "triggers": ["<f="]}


def accepts(served: Served, grammar: str, text: str) -> bool:
    """Whether `text` follows `grammar` as a whole."""
    tokenizer = served.tokenizer
    known = LLTokenizer(str(tokenizer.path / "tokenizer.json"), eos_token=min(tokenizer.eos_ids))
    matcher = LLMatcher(known, grammar, log_level=0)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


class City(BaseModel):
    name: str
    people: int


def test_structured_output_is_parsed_by_the_client(served: Served) -> None:
    say(served, '{"name": "Paris", "people": 2000000}')
    asked: Any = {"model": "tiny", "messages": [USER], "max_tokens": 100}
    parsed = served.client(strict=False).chat.completions.parse(**asked, response_format=City)
    assert parsed.choices[0].message.parsed == City(name="Paris", people=2000000)
    assert '"people"' in served.session.asked[-1][1].grammar


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema"),
        ({"structured_outputs": {"json": {"type": "object"}}}, "json_schema"),
        ({"structured_outputs": {"json": '{"type": "object"}'}}, "json_schema"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "start"),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "b"'}}, "start"),
        ({"guided_grammar": 'start: "a" | "b"'}, "start"),
        ({"guided_regex": "a+"}, "start"),
        ({"response_format": {"type": "structural_tag"} | TAG}, "start"),
        ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, "start"),
        ({"guided_choice": ["a", "b"]}, "start"),
        ({"response_format": {"type": "text"}, "guided_json": None}, ""),
    ],
)
def test_every_way_to_ask_for_a_grammar(served: Served, path: str, fields: dict[str, Any], kind: str) -> None:
    say(served, "a")
    text = {"messages": [USER]} if "chat" in path else {"prompt": "Hello"}
    answer = httpx.post(served.url + path, json={"model": "tiny", "max_tokens": 5} | text | fields)
    assert answer.status_code == 200, answer.text
    grammar = served.session.asked[-1][1].grammar
    assert kind in grammar and bool(grammar) == bool(kind)


def test_free_text_with_structures_in_it(served: Served) -> None:
    """Would catch a structure that may be anything, and one that the rest of the text must be."""
    say(served, "a")
    asked = {"model": "tiny", "messages": [USER], "max_tokens": 5}
    ask = f"{served.url}/v1/chat/completions"
    assert httpx.post(ask, json=asked | {"structured_outputs": {"structural_tag": TAG}}).status_code == 200
    grammar = served.session.asked[-1][1].grammar
    right = 'Let me see. <f=city>{"name": "Paris"}</f>'
    for text, follows in {right: True, "Nothing.": True, f"{right} So.": True, "<f=city>no": False}.items():
        assert accepts(served, grammar, text) == follows, text
    wrong = {"structural_tag": TAG | {"triggers": ["<g"]}}
    answer = httpx.post(ask, json=asked | {"structured_outputs": wrong})
    assert answer.status_code == 400 and "none of the triggers" in answer.json()["error"]["message"]


def test_reasoning_is_told_apart(byte_level_path: Path, tmp_path: Path) -> None:
    for file in byte_level_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1].content }}<think>\n")
    with serve(tmp_path) as served:
        say(served, "hm</think>\n\nYes.")
        asked: Any = {"model": "tiny", "messages": [USER], "max_tokens": 50}
        message: Any = served.client(strict=False).chat.completions.create(**asked).choices[0].message
        assert (message.content, message.reasoning_content) == ("Yes.", "hm")
        chunks = served.client(strict=False).chat.completions.create(**asked, stream=True)
        deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hm"
        assert "".join(delta.content or "" for delta in deltas) == "Yes."


def test_an_answer_begun_by_the_client_goes_on(served: Served) -> None:
    say(served, " Paris.")
    messages = [USER, {"role": "assistant", "content": "The city is"}]
    body = {"model": "tiny", "messages": messages, "continue_final_message": True}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body | {"add_generation_prompt": False})
    assert answer.json()["choices"][0]["message"]["content"] == " Paris."
    assert prompt(served).endswith("The city is")


def test_stop_strings_and_special_tokens_may_be_shown(served: Served) -> None:
    say(served, "one STOP two")
    body = {"model": "tiny", "messages": [USER], "stop": ["STOP"], "include_stop_str_in_output": True}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "one STOP"
    served.session.say(1, 60, 2)
    body = {"model": "tiny", "messages": [USER], "skip_special_tokens": False}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"].startswith("<|im_start|>")


ELSEWHERE: dict[str, list[Any]] = {
    "arguments as an object": [USER, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "weather", "arguments": {"city": "東京"}}}]}],
    "thoughts": [USER, {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "東京"}]}],
    "a refusal": [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "not 東京"}]}],
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_conversations_of_other_servers_go_on(teaching: Served, name: str) -> None:
    say(teaching, "Fine")
    body = {"model": "tiny", "messages": [*ELSEWHERE[name], USER], "store": True, "service_tier": "flex"}
    body |= {"prediction": {"type": "content", "content": "x"}, "max_tokens": 2}
    answer = httpx.post(f"{teaching.url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert "東京" in prompt(teaching) and "hm" not in prompt(teaching)


def test_formats_that_mean_nothing_to_the_grammar_are_no_fault(roomy: Served) -> None:
    schema = {"type": "object", "properties": {"format": {"type": "string", "format": "password"},
              "at": {"type": "string", "format": "date"}, "kind": {"enum": [{"format": "x"}]}}}  # fmt: skip
    body = {"model": "tiny", "messages": [USER], "max_tokens": 2, "guided_json": schema}
    say(roomy, "{}")
    assert httpx.post(f"{roomy.url}/v1/chat/completions", json=body).status_code == 200
    grammar = roomy.session.asked[-1][1].grammar
    assert "password" not in grammar and '"date"' in grammar and '"format":"x"' in grammar.replace(" ", "")
