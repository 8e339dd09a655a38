"""Write Grafana's dashboards into deploy/grafana; with --check only say whether they are current.

`python -m scripts.dashboards`, with the library of the development tools.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="Prefer using dashboardv2")  # v1 is what every Grafana from 9 on reads

from grafana_foundation_sdk.cog.encoder import JSONEncoder  # noqa: E402

from scripts.dashboards.balance import balance  # noqa: E402
from scripts.dashboards.exchange import exchange  # noqa: E402
from scripts.dashboards.fleet import fleet  # noqa: E402
from scripts.dashboards.serving import serving  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "grafana"


def rendered() -> dict[str, str]:
    """File name -> JSON of every dashboard."""
    boards = {"balance": balance(), "exchange": exchange(), "serving": serving(), "fleet": fleet()}
    return {
        f"{name}.json": json.dumps(board.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        for name, board in boards.items()
    }


def main() -> None:
    files = rendered()
    if sys.argv[1:] != ["--check"]:
        for name, text in files.items():
            (FOLDER / name).write_text(text, encoding="utf-8")
        return
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    if there != files:
        raise SystemExit("deploy/grafana is not current; run `make dashboards` and commit the result")


if __name__ == "__main__":
    main()
