"""Write what the Helm chart has from elsewhere: its README's table, options in its schema, rules and dashboards.

The table is made of the lines `# --` in values.yaml, the schema's `config` of `cluster.config`, what the schema says of
parts of pods of Kubernetes' own schemas (`kubernetes-validate`), and the files are copies of deploy/prometheus and
deploy/grafana, since a chart reads nothing outside of itself. With --check only say what is not current.
"""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import kubernetes_validate
import yaml

from cluster.config_load import FIELDS, HINTS

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "expertmesh"
BEGIN, END = "<!-- values: scripts/chart.py writes this -->\n", "<!-- values end -->"
_COPIES = {"prometheus": ("rules.yml", "alerts.yml"), "grafana": ("*.json",)}
_WIDTH = 112  # of a line of the schema
_KUBERNETES = "1.36"  # whose parts of pods the schema takes; what KubeRay's own has is a part of them
_PREFIX = "#/$defs/io.k8s."
_KEY = re.compile(r"( *)([A-Za-z_][\w.-]*):(?: (.*))?$")


def rows(text: str) -> Iterator[tuple[str, Any, str]]:
    """(path, default, what it says) of each value with a line `# --`. SystemExit on a value without one."""
    values = yaml.safe_load(text)
    path: list[tuple[int, str]] = []  # (indentation, key) of the keys around this line
    covered: int | None = None  # indentation of a value that was said; what is deeper belongs to it
    said: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("#"):
            if stripped.startswith("# --"):
                said = [stripped.removeprefix("# --").strip()]
            elif said:
                said.append(stripped.removeprefix("#").strip())
            continue
        match = _KEY.fullmatch(line)
        if match is None:
            continue
        indent, key = len(match[1]), match[2]
        if covered is not None and indent > covered:
            continue
        covered = None
        path = [entry for entry in path if entry[0] < indent] + [(indent, key)]
        keys = [entry[1] for entry in path]
        value: Any = values
        for part in keys:
            value = value[part]
        if said:
            yield ".".join(keys), value, " ".join(said)
            covered, said = indent, []
        elif not isinstance(value, dict) or not value:
            raise SystemExit(
                f"{CHART / 'values.yaml'}:{number}: {'.'.join(keys)} has no line `# --` that says what it is"
            )


def table(text: str) -> str:
    """Values as a table in Markdown, one for each group of them."""
    groups: dict[str, list[str]] = {"": []}
    for path, default, said in rows(text):
        shown = json.dumps(default).replace("|", "\\|")
        line = f"| `{path}` | `{shown}` | {said.replace('|', chr(92) + '|')} |"
        groups.setdefault(path.partition(".")[0] if "." in path else "", []).append(line)
    lines: list[str] = []
    for group, found in groups.items():
        lines += [
            "",
            f"### {group}" if group else "### Of the whole",
            "",
            "| value | default | |",
            "|---|---|---|",
            *found,
        ]
    return "\n".join(lines[1:]) + "\n"


def options() -> dict[str, Any]:
    """The schema of `config`: every option of `expertmesh serve`, and nothing else."""
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _option(name) for name in FIELDS},
    }


def _option(name: str) -> dict[str, Any]:
    hint, bounds = HINTS[name], FIELDS[name].metadata
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(arm for arm in get_args(hint) if arm is not type(None))
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    found: dict[str, Any] = {"type": {int: "integer", float: "number", bool: "boolean"}.get(hint, "string")}
    for key, said in (("minimum", "at_least"), ("maximum", "at_most")):
        if bounds[said] is not None:
            found[key] = bounds[said]
    return found


def schema(text: str, values: dict[str, Any]) -> str:
    """The schema with `config`, and what cannot be left out, made anew."""
    content = json.loads(text)
    content["$defs"]["config"] = options()
    _define(content)
    _require(content, values)
    return _compact(content) + "\n"


def _define(content: dict[str, Any]) -> None:
    """Kubernetes' own definitions of what is referred to: an API server would drop a misspelt field without a word."""
    own = {name: part for name, part in content["$defs"].items() if not name.startswith("io.k8s.")}
    known = _kubernetes()
    found: dict[str, Any] = {}
    left = list(_references({**content, "$defs": own}))
    while left:
        if (name := left.pop()) not in found:
            found[name] = _plain(known[name])
            left += _references(found[name])
    content["$defs"] = own | dict(sorted(found.items()))


def _kubernetes() -> dict[str, Any]:
    directory = next(Path(kubernetes_validate.__file__).parent.glob(f"*/v{_KUBERNETES}.*-local-strict"))
    definitions: dict[str, Any] = json.loads((directory / "_definitions.json").read_text(encoding="utf-8"))["$defs"]
    return definitions


def _references(part: Any) -> Iterator[str]:
    """Definitions of Kubernetes that `part` of a schema refers to."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "$ref" and value.startswith(_PREFIX):
                yield value.removeprefix("#/$defs/")
            yield from _references(value)
    elif isinstance(part, list):
        for value in part:
            yield from _references(value)


def _plain(part: Any) -> Any:
    """Without descriptions and what only API servers understand."""
    if isinstance(part, dict):
        return {
            key: _plain(value)
            for key, value in part.items()
            if isinstance(value, dict) or not (key in ("description", "format") or key.startswith("x-kubernetes-"))
        }
    return [_plain(value) for value in part] if isinstance(part, list) else part


def _require(rule: dict[str, Any], values: dict[str, Any]) -> None:
    """Helm takes a value that is set to null away. Lists and free objects are empty then; the rest is needed."""
    rule["required"] = []
    for key, value in values.items():
        part = rule["properties"][key]
        if isinstance(value, dict) and "properties" in part and value:
            _require(part, value)
            rule["required"].append(key)
        elif not isinstance(value, dict | list) and value is not None:
            rule["required"].append(key)


def _compact(value: Any, indent: int = 0) -> str:
    """JSON in which whatever fits into a line is one."""
    line = json.dumps(value)
    if len(line) + indent <= _WIDTH or not isinstance(value, dict | list):
        return line
    pad, end = " " * (indent + 1), "\n" + " " * indent
    if isinstance(value, dict):
        inner = (f"{json.dumps(key)}: {_compact(part, indent + 1)}" for key, part in value.items())
        return "{\n" + ",\n".join(pad + part for part in inner) + end + "}"
    return "[\n" + ",\n".join(pad + _compact(part, indent + 1) for part in value) + end + "]"


def wanted() -> dict[Path, str]:
    """Every file that this writes, and what is to be in it."""
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    values = (CHART / "values.yaml").read_text(encoding="utf-8")
    rules = (CHART / "values.schema.json").read_text(encoding="utf-8")
    files = {
        CHART / "README.md": f"{before}{BEGIN}{table(values)}{END}{after}",
        CHART / "values.schema.json": schema(rules, yaml.safe_load(values)),
    }
    for folder, patterns in _COPIES.items():
        for pattern in patterns:
            for source in sorted((ROOT / "deploy" / folder).glob(pattern)):
                files[CHART / "files" / folder / source.name] = source.read_text(encoding="utf-8")
    return files


def main() -> None:
    files = wanted()
    left = {path for path in (CHART / "files").rglob("*.*") if path.is_file()} - set(files)
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if sys.argv[1:] == ["--check"]:
        if stale or left:
            names = ", ".join(str(path.relative_to(ROOT)) for path in (*stale, *sorted(left)))
            raise SystemExit(f"not current: {names}; run `python scripts/chart.py` and commit the result")
        return
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[path], encoding="utf-8")
    for path in left:
        path.unlink()


if __name__ == "__main__":
    main()
