"""The Responses API through OpenAI's client, which checks what it receives.

Catches: events in another order or of another shape, a conversation that is not gone on with, a store without bounds.
"""

from __future__ import annotations

from typing import Any

import openai
import pytest
from pydantic import BaseModel

from cluster.errors import RequestError
from cluster.gateway.responses import store as store_module
from cluster.gateway.responses.store import ResponseStore, Stored
from tests.unit.cluster.gateway.fake_gateway import Served
from tests.unit.cluster.gateway.scripted import CALL, WEATHER, prompt, say

TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather",
    "parameters": WEATHER,
    "strict": False,
}
ASKED: Any = {"model": "tiny", "input": "Weather?", "max_output_tokens": 150}


def ask(served: Served, stream: bool, **asked: Any) -> Any:
    """The response; of a stream the one that its client put together, after a look at the order of its events."""
    client = served.client()
    if not stream:
        return client.responses.create(**(ASKED | asked))
    events: list[Any] = list(client.responses.create(**(ASKED | asked), stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    response = events[-1].response
    written = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert written == response.output_text
    added = [event.item.id for event in events if event.type == "response.output_item.added"]
    done = [event.item.id for event in events if event.type == "response.output_item.done"]
    assert added == done == [item.id for item in response.output]
    return response


@pytest.mark.parametrize("stream", [False, True])
def test_text(roomy: Served, stream: bool) -> None:
    say(roomy, "Sunny.")
    response = ask(roomy, stream, instructions="Be brief.", metadata={"a": "b"})
    assert (response.status, response.output_text) == ("completed", "Sunny.")
    assert "Be brief." in prompt(roomy) and response.metadata == {"a": "b"}
    assert response.usage.input_tokens == len(roomy.session.asked[-1][0])
    cut = ask(roomy, stream, max_output_tokens=1)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


@pytest.mark.parametrize("stream", [False, True])
def test_tools_and_going_on(roomy: Served, stream: bool) -> None:
    say(roomy, f"Let me see. {CALL}")
    first = ask(roomy, stream, tools=[TOOL])
    assert [item.type for item in first.output] == ["message", "function_call"]
    call = first.output[1]
    assert (call.name, call.arguments) == ("weather", '{"city": "Paris"}')
    say(roomy, "Sunny.")
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sun"}]
    second = ask(roomy, stream, tools=[TOOL], input=result, previous_response_id=first.id)
    assert second.output_text == "Sunny." and second.previous_response_id == first.id
    told = prompt(roomy)
    assert told.index("Weather?") < told.index("Let me see.") < told.index("<tool_response>sun")
    by_hand: Any = [{"role": "user", "content": "Weather?"}, *first.output, *result]
    roomy.client().responses.create(**(ASKED | {"input": by_hand, "tools": [TOOL]}))
    assert prompt(roomy) == told


class City(BaseModel):
    city: str


def test_the_client_parses(roomy: Served) -> None:
    say(roomy, '{"city": "Rome"}')
    parsed = roomy.client(strict=False).responses.parse(**ASKED, text_format=City)
    assert parsed.output_parsed == City(city="Rome") and roomy.session.asked[-1][1].grammar


def test_responses_are_kept_unless_not_wanted(roomy: Served) -> None:
    client = roomy.client()
    say(roomy, "Sunny.")
    kept, other = ask(roomy, False), ask(roomy, False, store=False)
    assert client.responses.retrieve(kept.id).output_text == "Sunny."
    client.responses.delete(kept.id)
    for gone in (kept.id, other.id, "resp_none"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError):
            ask(roomy, False, previous_response_id=gone)


def test_errors_name_the_field_of_this_api(roomy: Served) -> None:
    for change, param in (
        ({"input": "word " * 3000}, "input"),
        ({"max_output_tokens": 10**6}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "y"}}}}, "text.format.schema"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            ask(roomy, False, **change)
        assert error.value.param == param


def test_the_store_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_CHARACTERS", 50_000)
    store = ResponseStore()
    for i in range(100):
        store.put(Stored({"id": str(i)}, [{"role": "user", "content": "x" * 10_000}]))
    assert store.get("99").response == {"id": "99"}
    with pytest.raises(RequestError):
        store.get("90")
