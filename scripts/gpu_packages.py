"""What `gpu_check.sh` finds on a machine: its GPUs, Python, torch and Triton, and what of the project's packages is
missing. Fails where there is no GPU."""

from __future__ import annotations

import platform
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PROJECT = Path(__file__).parents[1] / "pyproject.toml"
_BESIDE = ("triton", "transformers", "pytest", "pytest-timeout", "hypothesis")  # of extras, which the parts need too


def missing() -> list[str]:
    """Names of distributions that are not installed."""
    wanted = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    names = [re.split(r"[^\w.-]", each, maxsplit=1)[0] for each in wanted]
    return [name for name in (*names, *_BESIDE) if not _version(name)]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def main() -> None:
    import torch

    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"GPUs: {', '.join(cards) or 'none'}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, Triton {_version('triton') or 'missing'}")
    if names := missing():
        print(f"missing, so what imports them fails: {' '.join(names)}")
    sys.exit(not cards)


if __name__ == "__main__":
    main()
