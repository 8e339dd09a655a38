import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from common import ADA, FORECAST, MODEL, URL, Person
from openai import AsyncOpenAI

set_tracing_disabled(True)


@function_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


async def main() -> None:
    client = AsyncOpenAI(base_url=URL, api_key="unused", max_retries=0)
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind(model=MODEL, openai_client=client)
        for settings in (ModelSettings(), ModelSettings(tool_choice="required"), ModelSettings(tool_choice="auto")):
            agent = Agent(name="one", instructions="Help.", model=model, tools=[get_weather], model_settings=settings)
            assert (await Runner.run(agent, "Weather in Paris?")).final_output == FORECAST
        streamed = Runner.run_streamed(agent, "Weather in Paris?")
        async for _ in streamed.stream_events():
            pass
        assert streamed.final_output == FORECAST
        typed = Agent(name="two", instructions="Help.", model=model, output_type=Person)
        assert (await Runner.run(typed, "Who was Ada?")).final_output == ADA
        both = Agent(name="both", instructions="Help.", model=model, tools=[get_weather], output_type=Person)
        ran = await Runner.run(both, "Weather in Paris?")
        assert ran.final_output == ADA and any(item.type == "tool_call_item" for item in ran.new_items)
        first = Agent(name="three", instructions="Help.", model=model, handoffs=[typed])
        assert (await Runner.run(first, "Capital?")).final_output == "Paris."


asyncio.run(main())
