"""`expertmesh generate` as a user types it: text, JSON, seeds, stops and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cluster.generate import generate
from cluster.models.random import write_random

app = typer.Typer()
app.command()(generate)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "random"
    write_random(path)
    return str(path)


def run(directory: str, *options: str, code: int = 0, **more: Any) -> Any:
    environment = {"EXPERTMESH_KV_CACHE_MB": "4", "EXPERTMESH_ROUTER_THREADS": "1"}
    result = CliRunner().invoke(app, ["--model", directory, *options], env=environment, **more)
    assert result.exit_code == code, result.output
    return result


def result_of(directory: str, *options: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run(directory, "--json", "--max-tokens", "24", *options).stdout)
    return result


def test_the_text_that_is_shown_is_the_text_in_json(directory: str) -> None:
    told = result_of(directory, "Hello", "--ignore-eos")
    assert told["finish_reason"] == "length" and len(told["token_ids"]) == 24
    assert run(directory, "Hello", "--ignore-eos", "--max-tokens", "24").stdout == told["text"] + "\n"


def test_raw_text_goes_without_the_chat_template(directory: str) -> None:
    raw, chat = result_of(directory, "Hello", "--raw"), result_of(directory, "Hello")
    assert len(raw["prompt_ids"]) < len(chat["prompt_ids"])


def test_a_seed_repeats_an_answer_and_another_gives_another(directory: str) -> None:
    options = ("Hello", "--temperature", "1", "--ignore-eos")
    drawn = result_of(directory, *options)
    assert result_of(directory, *options, "--seed", str(drawn["seed"]))["token_ids"] == drawn["token_ids"]
    assert result_of(directory, *options)["token_ids"] != drawn["token_ids"]


def test_what_is_not_named_is_the_checkpoints(directory: str, tmp_path: Path) -> None:
    """Would catch an option whose own default hides what the checkpoint says, and a checkpoint that hides an option."""
    model = tmp_path / "model"
    shutil.copytree(directory, model)
    (model / "generation_config.json").write_text('{"temperature": 1.9, "max_new_tokens": 5}')
    hot = ("Hello", "--seed", "1", "--ignore-eos")
    drawn = json.loads(run(str(model), "--json", *hot).stdout)["token_ids"]
    assert len(drawn) == 5
    assert drawn == result_of(directory, *hot, "--temperature", "1.9")["token_ids"][:5]
    greedy = result_of(directory, *hot)["token_ids"]
    assert drawn != greedy[:5]
    assert result_of(str(model), *hot, "--temperature", "0")["token_ids"] == greedy
    off = CliRunner().invoke(
        app, ["--model", str(model), "--json", "--max-tokens", "24", *hot], env={"EXPERTMESH_GENERATION_DEFAULTS": "no"}
    )
    assert json.loads(off.stdout)["token_ids"] == greedy


def test_a_stop_text_ends_the_answer_before_it(directory: str) -> None:
    text = result_of(directory, "Hello", "--ignore-eos")["text"]
    stop = text[len(text) // 2 :][:3]
    cut = result_of(directory, "Hello", "--ignore-eos", "--stop", stop)
    assert (cut["text"], cut["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_a_prompt_may_come_from_standard_input(directory: str) -> None:
    piped = run(directory, "-", "--json", "--max-tokens", "2", input="Hello").stdout
    assert json.loads(piped)["prompt_ids"] == result_of(directory, "Hello")["prompt_ids"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["Hello", "--temperature", "9"], "'temperature' must be between"),
        (["Hello" * 5000], "context length"),
        (["Hello", "--model", "/nowhere"], "/nowhere"),
    ],
    ids=["parameter", "context", "model"],
)
def test_an_error_is_one_line(directory: str, options: list[str], message: str) -> None:
    result = run(directory, *options, code=1)
    assert message in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_config_file_names_the_model(directory: str, tmp_path: Path) -> None:
    file = tmp_path / "expertmesh.yaml"
    file.write_text(f"model: {directory}\nmax_context: 40\n")
    result = CliRunner().invoke(app, ["Hello", "--json", "--raw", "--ignore-eos", "--config", str(file)])
    told = json.loads(result.stdout)
    assert len(told["prompt_ids"]) + len(told["token_ids"]) == 40
