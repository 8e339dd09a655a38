"""Would catch kernels that are looked for in a cache without room, and an error of pages where a line says it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from workers.kernels.cpu import library


def test_a_cache_without_room_is_passed_over_but_not_for_kernels_that_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, other = tmp_path / "full", tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(full))
    monkeypatch.setattr(library.tempfile, "gettempdir", lambda: str(other))
    monkeypatch.setattr(library.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 1024))
    built: list[Path] = []

    def build(path: Path) -> None:
        built.append(path)
        path.touch()

    monkeypatch.setattr(library, "_build", build)
    path = library.object_file()
    assert built == [path] and path.is_relative_to(other)
    held = full / "expertmesh" / "kernels" / path.name
    held.touch()
    assert library.object_file() == held and len(built) == 1


def test_a_build_that_fails_says_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Traceback (most recent call last):\n  File ...\nOSError: [Errno 28] No space left on device\n"
    monkeypatch.setattr(library.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", said))
    with pytest.raises(RuntimeError) as caught:
        library._build(tmp_path / "x.o")
    assert str(caught.value) == "building them failed: OSError: [Errno 28] No space left on device"
