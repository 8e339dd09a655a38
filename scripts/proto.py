"""Generate workers/pb from proto/*.proto; with --check only say whether the committed code is current.

The files are compiled under the virtual path `workers/pb`, so that the generated code imports its siblings as
`from workers.pb import ...` and needs no patching.
"""

from __future__ import annotations

import filecmp
import os
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("workers/pb")


def generate(target: Path) -> None:
    """Write the Python code and type stubs of every .proto file below `target`/workers/pb."""
    sources = sorted(str(PACKAGE / source.name) for source in (ROOT / "proto").glob("*.proto"))
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python")]
    stubs = [f"--{kind}_out=quiet:{target}" for kind in ("mypy", "mypy_grpc")]
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # has the plugins
    if protoc.main(["protoc", f"-I{PACKAGE}={ROOT / 'proto'}", *outputs, *stubs, *sources]) != 0:
        raise SystemExit("protoc failed")


def stale(generated: Path) -> list[str]:
    """Names that differ between fresh code in `generated` and the committed code, or are in one of them only."""
    committed = ROOT / PACKAGE
    names = {path.name for place in (generated, committed) for path in place.glob("*_pb2*")}
    _, differing, missing = filecmp.cmpfiles(generated, committed, names, shallow=False)
    return sorted(differing + missing)


def main() -> None:
    if sys.argv[1:] != ["--check"]:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        if names := stale(Path(directory) / PACKAGE):
            raise SystemExit(f"not current in {PACKAGE}: {', '.join(names)}; run `make proto` and commit the result")


if __name__ == "__main__":
    main()
