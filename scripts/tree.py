"""Write the tree of the code into README.md, one remark per file; with --check only say whether it is current.

The remark of a module is the first sentence of its docstring, so that there is one place to keep true.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- tree: scripts/tree.py writes this -->\n```\n", "```\n<!-- tree ends -->"
FOLDERS = ("proto", "workers", "cluster", "benchmarks", "scripts")
_WIDTH = 118


def remark(path: Path) -> str:
    """The first sentence of what the file says of itself."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".proto":
        said = text.partition("//")[2]
    else:
        said = ast.get_docstring(ast.parse(text)) or ""
    line = said.strip().partition("\n")[0]
    return line.partition(". ")[0].rstrip(".")


def lines(folder: Path, indent: str = "") -> Iterator[str]:
    """One line per file below `folder`, folders after files; empty packages are not worth one."""
    entries = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
    for path in entries:
        if path.is_dir():
            if path.name == "pb":
                yield f"{indent}  pb/  what `make proto` generates from proto/"
            elif any(path.rglob("*.py")):
                yield f"{indent}  {path.name}/"
                yield from lines(path, indent + "  ")
        elif path.suffix in (".py", ".proto") and (said := remark(path)):
            line = f"{indent}  {path.name:{max(20 - len(indent), 1)}} {said}"
            yield line if len(line) <= _WIDTH else line[: _WIDTH - 2].rsplit(" ", 1)[0] + " …"


def tree() -> str:
    return "".join(
        f"{line}\n" for name in FOLDERS for line in (f"{name}/", *lines(ROOT / name)) if "__pycache__" not in line
    )


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    fresh = f"{before}{BEGIN}{tree()}{END}{after}"
    if sys.argv[1:] != ["--check"]:
        readme.write_text(fresh, encoding="utf-8")
    elif fresh != text:
        raise SystemExit("the tree in README.md is not current; run `make tree` and commit the result")


if __name__ == "__main__":
    main()
