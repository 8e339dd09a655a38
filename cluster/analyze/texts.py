"""The texts of an analysis: a domain for each file or directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import TextError


@dataclass(frozen=True, slots=True)
class Domain:
    """Texts of one kind, named after their file (without its ending) or directory."""

    name: str
    documents: tuple[str, ...]


def read_domains(paths: Sequence[Path]) -> list[Domain]:
    """One domain for each path: a text file, JSON lines with a `text` each (*.jsonl), or a directory of such files.

    Hidden files and empty texts are left out. Raises TextError for what cannot be read, a domain without text, and two
    of one name.
    """
    domains: list[Domain] = []
    for path in paths:
        name = path.resolve().name if path.is_dir() else path.stem
        if name in (domain.name for domain in domains):
            raise TextError(f"{path}: there is a domain {name} already; name one of the two files otherwise")
        files = sorted(file for file in path.rglob("*") if _is_shown(file, path)) if path.is_dir() else [path]
        documents = tuple(text for file in files for text in _read(file) if text.strip())
        if not documents:
            raise TextError(f"{path}: there is no text in it")
        domains.append(Domain(name, documents))
    return domains


def _is_shown(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


def _read(file: Path) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")  # which some editors begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise TextError(f"{file}: {reason}") from error
    if file.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):  # JSON may have other separators of lines within a text
        if not line.strip():
            continue
        try:
            value = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise TextError(f"{file}, line {number}: not a JSON object with a `text`") from error
        if not isinstance(value, str):
            raise TextError(f"{file}, line {number}: `text` is no string")
        yield value
