from common import MODEL, URL
from smolagents import CodeAgent, OpenAIServerModel, ToolCallingAgent, tool


@tool
def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: its name
    """
    return f"sunny in {city}"


model = OpenAIServerModel(MODEL, api_base=URL, api_key="unused")
agent = ToolCallingAgent(tools=[get_weather], model=model, max_steps=3, verbosity_level=0)
assert "sunny" in str(agent.run("Weather in Paris?"))
streaming = ToolCallingAgent(tools=[get_weather], model=model, max_steps=3, verbosity_level=0, stream_outputs=True)
assert "sunny" in str(streaming.run("Weather in Paris?"))
for structured in (False, True):
    coder = CodeAgent(tools=[], model=model, max_steps=2, verbosity_level=0,
                      use_structured_outputs_internally=structured)  # fmt: skip
    assert coder.run("Capital of France?") == "Paris"
