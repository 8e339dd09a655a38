"""The Messages API through Anthropic's own client, which checks what it receives.

Catches: events in another order or of another shape, a conversation with tools that does not come back into the prompt,
an error outside the envelope.
"""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import pytest

from tests.unit.cluster.gateway.fake_gateway import Served
from tests.unit.cluster.gateway.scripted import CALL, WEATHER, prompt, say

TOOL: Any = {"name": "weather", "description": "The weather of a city", "input_schema": WEATHER}
USER: Any = {"role": "user", "content": "Weather?"}
ASKED: Any = {"model": "tiny", "max_tokens": 150, "messages": [USER]}


def client(served: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key="unused", max_retries=0, _strict_response_validation=True)


def ask(served: Served, stream: bool, **asked: Any) -> anthropic.types.Message:
    if not stream:
        return client(served).messages.create(**(ASKED | asked))
    with client(served).messages.stream(**(ASKED | asked)) as events:
        for _ in events:
            pass
        return events.get_final_message()


@pytest.mark.parametrize("stream", [False, True])
def test_text(roomy: Served, stream: bool) -> None:
    say(roomy, "The capital of France is Paris.")
    message = ask(roomy, stream, system=[{"type": "text", "text": "Be brief."}])
    assert [block.text for block in message.content] == ["The capital of France is Paris."]  # type: ignore[union-attr]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    asked = roomy.session.asked[-1][0]
    used = message.usage
    assert used.input_tokens + (used.cache_creation_input_tokens or 0) == len(asked) and used.output_tokens > 5
    assert "Be brief." in prompt(roomy)


@pytest.mark.parametrize("stream", [False, True])
def test_tools(roomy: Served, stream: bool) -> None:
    say(roomy, f"Let me see. {CALL}{CALL}")
    message = ask(roomy, stream, tools=[TOOL])
    assert message.stop_reason == "tool_use"
    assert [block.type for block in message.content] == ["text", "tool_use", "tool_use"]
    uses: Any = message.content[1:]
    assert [(use.name, use.input) for use in uses] == [("weather", {"city": "Paris"})] * 2
    say(roomy, "Sunny.")
    result = {"type": "tool_result", "tool_use_id": uses[0].id, "content": [{"type": "text", "text": "sun"}]}
    turns = [USER, {"role": "assistant", "content": [b.model_dump() for b in message.content]},
             {"role": "user", "content": [result, {"type": "text", "text": "And?"}]}]  # fmt: skip
    ask(roomy, stream, tools=[TOOL], messages=turns)
    assert CALL in prompt(roomy).replace("\\", "") and "<tool_response>sun</tool_response>" in prompt(roomy)


@pytest.mark.parametrize("stream", [False, True])
def test_why_it_ended(roomy: Served, stream: bool) -> None:
    say(roomy, "one STOP two")
    message = ask(roomy, stream, stop_sequences=["STOP"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "STOP")
    assert ask(roomy, stream, max_tokens=1).stop_reason == "max_tokens"


def test_choices_of_tools_become_grammars(roomy: Served) -> None:
    say(roomy, '{"city": "Rome"}')
    message: Any = ask(roomy, False, tools=[TOOL], tool_choice={"type": "tool", "name": "weather"})
    assert message.content[-1].input == {"city": "Rome"} and roomy.session.asked[-1][1].grammar
    ask(roomy, False, output_config={"format": {"type": "json_schema", "schema": WEATHER}})
    assert '"city"' in roomy.session.asked[-1][1].grammar


def test_counting_is_what_is_asked(roomy: Served) -> None:
    say(roomy, "x")
    ask(roomy, False, tools=[TOOL])
    counted = client(roomy).messages.count_tokens(model="tiny", messages=[USER], tools=[TOOL])
    assert counted.input_tokens == len(roomy.session.asked[-1][0])


@pytest.mark.parametrize(
    ("change", "status", "kind"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error"),
        ({"model": "other"}, 404, "not_found_error"),
    ],
)
def test_errors(roomy: Served, change: dict[str, Any], status: int, kind: str) -> None:
    answer = httpx.post(f"{roomy.url}/v1/messages", json=ASKED | change)
    assert answer.status_code == status
    assert answer.json()["type"] == "error" and answer.json()["error"]["type"] == kind


def test_a_stream_that_breaks_off_says_so(roomy: Served) -> None:
    say(roomy, "one two three four five")
    roomy.session.failure = RuntimeError("secret")
    with pytest.raises(anthropic.APIStatusError) as error:
        ask(roomy, True)
    assert "secret" not in str(error.value)
