from common import ADA, FORECAST, MODEL, ROOT, URL, Person
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


chat = ChatOpenAI(model=MODEL, base_url=URL, api_key="unused", max_retries=0)
responses = ChatOpenAI(model=MODEL, base_url=URL, api_key="unused", max_retries=0, use_responses_api=True)
claude = ChatAnthropic(model_name=MODEL, base_url=ROOT, api_key="unused", max_retries=0)

for model in (chat, responses):
    for method in ("json_schema", "function_calling"):
        assert model.with_structured_output(Person, method=method).invoke("Who was Ada?") == ADA, method
    assert model.with_structured_output(Person, method="json_schema", strict=True).invoke("Who was Ada?") == ADA
    raw = model.with_structured_output(Person, include_raw=True).invoke("Who was Ada?")
    assert raw["parsed"] == ADA and raw["parsing_error"] is None
assert chat.with_structured_output(Person, method="json_mode").invoke("Ada, as JSON") == ADA
assert claude.with_structured_output(Person).invoke("Who was Ada?") == ADA

for model in (chat, responses, claude):
    bound = model.bind_tools([get_weather])
    asked = [HumanMessage("Weather in Paris?")]
    whole = None
    for chunk in bound.stream(asked):
        whole = chunk if whole is None else whole + chunk
    for answer in (bound.invoke(asked), whole):
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"}), call
        told = [*asked, answer, ToolMessage("sunny", tool_call_id=call["id"])]
        assert FORECAST in str(bound.invoke(told).content)
    forced = model.bind_tools([get_weather], tool_choice="get_weather").invoke(asked)
    assert forced.tool_calls[0]["args"] == {"city": "Paris"}
    assert model.bind_tools([get_weather], tool_choice="any").invoke(asked).tool_calls

assert OpenAI(model=MODEL, base_url=URL, api_key="unused").invoke("The capital is") == "Paris."
assert chat.bind(logprobs=True, top_logprobs=1).invoke("Hi").response_metadata["logprobs"]["content"]
