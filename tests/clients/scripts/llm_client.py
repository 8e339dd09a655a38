import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import FORECAST, MODEL, URL

with tempfile.TemporaryDirectory() as directory:
    os.environ["LLM_USER_PATH"] = directory
    Path(directory, "extra-openai-models.yaml").write_text(
        f"- model_id: mesh\n  model_name: {MODEL}\n  api_base: {URL}\n  api_key_name: mesh\n"
        "  supports_tools: true\n  supports_schema: true\n"
    )
    Path(directory, "keys.json").write_text('{"mesh": "unused"}')

    def llm(*words: str) -> str:
        command = [sys.executable, "-m", "llm", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

    assert llm("-m", "mesh", "Capital of France?") == "Paris."
    assert llm("-m", "mesh", "Capital of France?", "--no-stream") == "Paris."
    assert json.loads(llm("-m", "mesh", "--schema", "name, age int", "Ada")) == {"name": "Ada", "age": 36}
    function = "def get_weather(city: str) -> str:\n    'The weather of a city.'\n    return 'sunny'\n"
    assert FORECAST in llm("-m", "mesh", "--functions", function, "Weather in Paris?")
