"""Catches an option of the configuration that the command line lacks, an error that shows a traceback, slow help."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import Config
from cluster.config_load import flag

runner = CliRunner()


@pytest.fixture(autouse=True)
def nobody_elses_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for field in fields(Config):
        monkeypatch.delenv(f"EXPERTMESH_{field.name.upper()}", raising=False)


@pytest.mark.parametrize("command", ["serve", "config"])
def test_every_field_is_an_option(command: str) -> None:
    text = runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    for field in fields(Config):
        assert field.name == "model" or flag(field.name) in text
        assert field.metadata["help"].split(";")[0][:40] in text


def test_config_shows_values_and_origins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("block_size: 8\n")
    monkeypatch.setenv("EXPERTMESH_ROUTERS", "3")
    result = runner.invoke(app, ["config", "some/model", "--port", "81", "--config", str(file), "--json"])
    shown = json.loads(result.output)
    assert shown["model"] == {"value": "some/model", "origin": "--model"}
    assert shown["port"] == {"value": 81, "origin": "--port"}
    assert shown["routers"] == {"value": 3, "origin": "EXPERTMESH_ROUTERS"}
    assert shown["block_size"] == {"value": 8, "origin": str(file)}
    assert shown["host"] == {"value": "127.0.0.1", "origin": "default"}


def test_what_config_prints_is_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "again.yaml"
    file.write_text(runner.invoke(app, ["config", "--port", "81", "--max-context", "99"]).output)
    again = json.loads(runner.invoke(app, ["config", "--config", str(file), "--json"]).output)
    assert (again["port"]["value"], again["max_context"]["value"]) == (81, 99)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["config", "--port", "0"], "error: port (--port): 0 must be between 1 and 65535"),
        (["serve", "--host", "0.0.0.0"], "no API keys"),
        (["status"], "error: no cluster of this user is running"),
        (["stop"], "error: no cluster of this user is running"),
    ],
)
def test_errors_are_one_line(arguments: list[str], says: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_what_the_system_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/em/haproxy")

    monkeypatch.setattr("cluster.fleet.serve.serve", full)
    result = runner.invoke(app, ["serve"])
    assert (result.exit_code, result.stderr) == (1, "error: [Errno 28] No space left on device: '/tmp/em/haproxy'\n")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cluster.cli import app; import typer.main; typer.main.get_command(app);"
        "print([m for m in ('torch', 'ray', 'grpc', 'numba', 'fastapi', 'tokenizers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


def test_bench_lists_without_importing() -> None:
    listed = runner.invoke(app, ["bench", "--help"]).output
    assert all(name in listed for name in ("serve", "chaos"))


def test_a_terminal_that_knows_ascii_alone_gets_what_it_knows() -> None:
    """Help has characters beyond ASCII, and so has what models say."""
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    code = "from cluster.cli import app; app(['serve', '--help'])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | ascii_only, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--expert-workers" in done.stdout


def test_a_directory_that_was_removed_is_left(tmp_path: Path) -> None:
    """Libraries that ask where they are end the process: oneMKL does, with words about a file that is there."""
    (tmp_path / "gone").mkdir()
    code = f"import os; os.chdir({str(tmp_path / 'gone')!r}); os.rmdir(os.getcwd()); from cluster.cli import app; "
    code += f"app(['model', 'random', {str(tmp_path / 'tiny')!r}])"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True)
    assert (tmp_path / "tiny" / "config.json").is_file()


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&- 2>&-", "<&-"])
def test_a_stream_that_is_closed_is_nobody_else_s(closed: str, tmp_path: Path) -> None:
    """Else the first file that is opened is where all that is printed goes. Children get them too."""
    out = tmp_path / "out"
    code = f"""
import os, subprocess, sys
from cluster.process_setup import set_up
set_up()
with open({str(out)!r}, "w") as file:
    print("lost"), print("lost", file=sys.stderr), sys.stdin.read()
    os.write(1, b"lost"), os.write(2, b"lost")
    child = "import sys; print(1, flush=True); print(2, file=sys.stderr, flush=True); sys.stdin.read()"
    done = subprocess.run([sys.executable, "-c", child])
    print(file.fileno(), done.returncode, file=file)
"""
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-P", "-c", code]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    number, returncode = map(int, out.read_text().split())
    assert number > 2 and returncode == 0


def test_warnings_of_libraries_end_nothing() -> None:
    """In Ray alone are a dozen."""
    code = """
import os, warnings
from cluster.process_setup import let_libraries_warn
let_libraries_warn(os.environ)
warnings.warn("old", DeprecationWarning); warnings.warn("odd", RuntimeWarning)
assert "PYTHONWARNINGS" not in os.environ
"""
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONWARNINGS": "ignore::UserWarning,error"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "PYTHONWARNINGS" in done.stderr and "odd" in done.stderr and "old" not in done.stderr
