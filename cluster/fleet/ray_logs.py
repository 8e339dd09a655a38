"""What Ray's processes left in their logs when a start failed: the cause, which Ray itself does not say."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_LINE = re.compile(r"^\[[^\]]* (?P<level>[CEF]) [^\]]*\] (\([^)]*\) )?(\S+:\d+: )?(?P<text>.*)")
# In the order in which they start: who fails first is the cause of what fails later.
_PROCESSES = ("gcs_server", "raylet")
_KEPT = 5


def cause(logs: Path) -> str | None:
    """The gravest line of the first of Ray's processes that complains; None when none does."""
    for process in _PROCESSES:
        found: dict[str, str] = {}
        for suffix in ("err", "out"):
            for file in sorted(logs.glob(f"{process}*.{suffix}")):
                for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                    if match := _LINE.match(line):
                        found.setdefault("E" if match["level"] == "E" else "C", match["text"].strip())
        if found:
            return f"{process}: {found.get('C') or found['E']}"
    return None


def keep(logs: Path, directory: Path) -> Path | None:
    """Move `logs` below `directory`, of which the newest few stay; where they are now, None if that is impossible."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        place = directory / logs.resolve().parent.name
        shutil.move(str(logs.resolve()), place)
        for old in sorted(directory.iterdir())[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:
        return None
    return place
