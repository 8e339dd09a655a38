"""What every client's script begins with: `python SCRIPT URL`, where URL is the gateway's, without /v1."""

from __future__ import annotations

import os
import sys

from pydantic import BaseModel

ROOT = sys.argv[1]
URL = f"{ROOT}/v1"
MODEL = "tiny"
FORECAST = "It is sunny in Paris."

os.environ |= {"OPENAI_API_KEY": "unused", "OPENAI_BASE_URL": URL, "ANTHROPIC_API_KEY": "unused"}
os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "DSPY_CACHEDIR": "/tmp/none"}


class Person(BaseModel):
    """Somebody, with their age."""

    name: str
    age: int


ADA = Person(name="Ada", age=36)
