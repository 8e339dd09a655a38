"""The default model is built once, whole or not at all, however many processes ask; and what a user calls a model is
found. The fetch gives a tiny GGUF file here; `test_wheel` has the real one."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import cluster.models.default as default_module
from cluster.errors import CheckpointError
from cluster.models import resolve
from cluster.models.default import NAME, cache_directory, default_model
from tests.tiny_llama import save_llama, write_gguf
from workers.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    save_llama(directory / "dense")
    write_gguf(directory / "model.gguf", directory / "dense")
    return directory / "model.gguf"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "expertmesh" / "models"


@pytest.fixture
def fetches(tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The fetches made so far."""
    made: list[Path] = []

    def fetch(scratch: Path, progress: Callable[[float], None]) -> Path:
        made.append(scratch)
        return Path(shutil.copy(tiny_gguf, scratch))

    monkeypatch.setattr(default_module, "_fetch", fetch)
    return made


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, base in (
        ("/var/cache/me", Path("/var/cache/me")),
        ("relative", tmp_path / ".cache"),
        ("", tmp_path / ".cache"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_directory() == base / "expertmesh" / "models"


def test_built_once_and_progress_is_told(fetches: list[Path], cache: Path) -> None:
    told: list[tuple[str, float]] = []
    assert default_model(lambda what, fraction: told.append((what, fraction))) == cache / NAME
    checkpoint = Checkpoint(cache / NAME)
    checkpoint.verify()
    assert (checkpoint.spec.n_experts, checkpoint.spec.top_k) == (8, 2)
    stages = list(dict.fromkeys(what for what, _ in told))
    assert stages == ["fetching the dense model", "reading the dense model", "fitting the gates", "writing the experts"]
    assert all((stage, 1.0) in told for stage in stages)
    assert default_model() == cache / NAME
    assert len(fetches) == 1


@pytest.mark.parametrize("chosen", [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 1.0}], ids=str)
def test_a_model_built_earlier_gets_the_sampling_of_its_card(
    fetches: list[Path], cache: Path, chosen: dict[str, float]
) -> None:
    """Would catch a cached model that goes on sampling at temperature 1, a lost end of sequence, a changed choice."""
    file = default_model() / "generation_config.json"
    built = json.loads(file.read_text())
    assert (built["temperature"], built["top_p"], built["eos_token_id"]) == (0.2, 0.5, [2])
    before = {name: value for name, value in built.items() if name not in ("temperature", "top_p")}
    file.write_text(json.dumps(before | chosen))
    default_model()
    assert json.loads(file.read_text()) == built | chosen
    assert len(fetches) == 1
    assert not list(file.parent.glob(".*"))


def test_a_model_in_a_cache_of_somebody_elses_is_served_as_it_is(
    fetches: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = default_model() / "generation_config.json"
    file.write_text("{}")

    def refuse(path: Path, values: object) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(default_module, "write_json", refuse)
    assert default_model() == cache / NAME
    assert file.read_text() == "{}"


def test_everybody_asks_at_once(fetches: list[Path], cache: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(default_model())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / NAME] * 4
    assert len(fetches) == 1


def test_a_killed_build_leaves_no_litter(fetches: list[Path], cache: Path) -> None:
    """A build is 1.4 GB: what a killed one left is removed by the next."""
    for name in (f".{NAME}.building-4711", f".{NAME}.source-building-xyz"):
        (cache / name).mkdir(parents=True)
        (cache / name / "model.safetensors").write_text("half")
    default_model()
    assert {path.name for path in cache.iterdir()} == {NAME, f".{NAME}.lock"}


def test_a_failed_build_can_be_tried_again(fetches: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(default_module, "write_upcycled", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            default_model()
    assert {path.name for path in cache.iterdir()} == {f".{NAME}.lock"}
    Checkpoint(default_model()).verify()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="cannot be built"):
        default_model()


# --- resolve


def test_resolve_default(fetches: list[Path], cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve("default") == cache / NAME
    output = capsys.readouterr()
    assert output.out == "" and "writing the experts" in output.err


def test_resolve_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory wins over a hub id of the same form."""
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("owner/name") == Path("owner/name")
    assert resolve("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize(
    "model", ["/no/such/dir", "./nope", "nope", "a/b/c", "", "../x/y", "~nobody-here/x", "owner/na me"]
)
def test_resolve_what_is_nothing(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve(model)


def test_resolve_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(str(tmp_path / "model.gguf"))
