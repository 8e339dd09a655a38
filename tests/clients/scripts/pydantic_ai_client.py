import asyncio

from common import ADA, FORECAST, MODEL, URL, Person
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

openai = OpenAIProvider(base_url=URL, api_key="unused")
chat = OpenAIChatModel(MODEL, provider=openai)
responses = OpenAIResponsesModel(MODEL, provider=openai)


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


async def main() -> None:
    for model in (chat, responses):
        agent = Agent(model, tools=[get_weather])
        assert (await agent.run("Weather in Paris?")).output == FORECAST
        async with agent.run_stream("Weather in Paris?") as streamed:
            assert await streamed.get_output() == FORECAST
        for output in (Person, ToolOutput(Person)):
            typed = Agent(model, output_type=output)
            assert (await typed.run("Who was Ada?")).output == ADA
            async with typed.run_stream("Who was Ada?") as streamed:
                assert await streamed.get_output() == ADA
    for model in (chat, responses):
        for output in (NativeOutput(Person), PromptedOutput(Person)):
            assert (await Agent(model, output_type=output).run("Who was Ada?")).output == ADA
        both = await Agent(model, tools=[get_weather], output_type=NativeOutput(Person)).run("Weather in Paris?")
        assert both.output == ADA and "sunny in Paris" in str(both.all_messages())
        assert (await Agent(model, output_type=[Person, str]).run("Who was Ada?")).output == ADA


asyncio.run(main())
