import dspy
from common import ADA, MODEL, URL, Person


class Who(dspy.Signature):
    """Who was it?"""

    question: str = dspy.InputField()
    person: Person = dspy.OutputField()


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


for kind in ("chat", "responses"):
    lm = dspy.LM(f"openai/{MODEL}", api_base=URL, api_key="unused", cache=False, num_retries=0, model_type=kind)
    for adapter in (dspy.ChatAdapter(), dspy.JSONAdapter()):
        with dspy.context(lm=lm, adapter=adapter):
            assert dspy.Predict("question -> answer")(question="Capital of France?").answer == "Paris"
            assert dspy.ChainOfThought("question -> answer")(question="Capital of France?").answer == "Paris"
            assert dspy.Predict(Who)(question="Who was Ada?").person == ADA
