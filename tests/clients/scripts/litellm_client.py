import asyncio
import json

import litellm
from common import ADA, FORECAST, MODEL, ROOT, URL, Person

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
USER = {"role": "user", "content": "Weather in Paris?"}
for provider in ("openai", "hosted_vllm"):
    base = {"model": f"{provider}/{MODEL}", "api_base": URL, "api_key": "unused", "num_retries": 0}
    for choice in (None, "auto", "required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = litellm.completion(messages=[USER], tools=[TOOL], tool_choice=choice, **base).choices[0].message
        (call,) = answer.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Paris"}
        told = [USER, answer.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        assert litellm.completion(messages=told, tools=[TOOL], **base).choices[0].message.content == FORECAST
    chunks = list(litellm.completion(messages=[USER], tools=[TOOL], stream=True, **base))
    whole = litellm.stream_chunk_builder(chunks, messages=[USER])
    assert whole.choices[0].message.tool_calls[0].function.name == "get_weather"
    typed = litellm.completion(messages=[{"role": "user", "content": "Ada?"}], response_format=Person, **base)
    assert Person.model_validate_json(typed.choices[0].message.content) == ADA
text = litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt="Hi", api_base=URL, api_key="unused")
assert text.choices[0].text == "Paris."
response = litellm.responses(model=f"openai/{MODEL}", input="Hi", api_base=URL, api_key="unused")
assert response.output[0].content[0].text == "Paris."


async def claude() -> None:
    answer = await litellm.anthropic.messages.acreate(
        model=f"anthropic/{MODEL}", api_base=ROOT, api_key="unused", max_tokens=100,
        messages=[{"role": "user", "content": "Hi"}],
    )  # fmt: skip
    assert answer["content"][0]["text"] == "Paris."


asyncio.run(claude())
