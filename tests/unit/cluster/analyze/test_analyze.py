"""`expertmesh analyze` against transformers' router logits, and as a user types it."""

from __future__ import annotations

import html.parser
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import typer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel
from typer.testing import CliRunner

from cluster.analyze.command import analyze
from cluster.analyze.recording import record
from cluster.analyze.texts import Domain, read_domains
from cluster.config import Config
from cluster.errors import TextError
from cluster.gateway.tokenizer import Tokenizer
from cluster.models.tokenizer import write_tokenizer
from cluster.router.build import build_model
from cluster.routing.trace import read_trace
from tests.reference import gate_choices, save_random

pytest.importorskip("matplotlib", reason="the charts need matplotlib: pip install 'expertmesh[analyze]'")

app = typer.Typer()
app.command()(analyze)

CODE = "def add(a, b):\n    return a + b\n" * 9
PROSE = "The ferry left the harbour. Nobody <script>waved</script> & nobody minded. " * 6


@dataclass(frozen=True)
class Model:
    directory: Path
    theirs: PreTrainedModel


def save(directory: Path, family: str, **sizes: object) -> Model:
    """A random model of 512 tokens with a tokenizer that begins texts with a token of its own."""
    theirs = save_random(directory, family=family, vocab_size=512, **sizes)
    write_tokenizer(directory, 512)
    file = str(directory / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(file)
    tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.save(file)
    return Model(directory, theirs)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return save(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("texts")
    (directory / "code").mkdir()
    (directory / "code" / "a.py").write_text(CODE)
    (directory / "code" / "b.py").write_text(CODE[40:200])
    (directory / "prose.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in (PROSE, PROSE[100:])))
    return [str(directory / "code"), str(directory / "prose.jsonl")]


def run(model: Model, *arguments: str, code: int = 0) -> str:
    environment = {"EXPERTMESH_KV_CACHE_MB": "4", "EXPERTMESH_ROUTER_THREADS": "1", "EXPERTMESH_MAX_BATCH_TOKENS": "50"}
    result = CliRunner().invoke(app, ["--model", str(model.directory), *arguments], env=environment)
    assert result.exit_code == code, result.output
    return result.output


def choices(model: Model, text: str) -> np.ndarray:
    """transformers' choices for every token of the text, [T, L, K]; the token put before it is run and left out."""
    ids = Tokenizer(model.directory).encode(text)
    assert ids[0] == 1
    return np.stack(gate_choices(model.theirs, ids), 1)[1:]


class Page(html.parser.HTMLParser):
    """What a browser would fetch, and the tags there are."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]


def test_every_figure_is_what_transformers_router_logits_give(mixtral: Model, texts: list[str], tmp_path: Path) -> None:
    """Would catch choices of the wrong token, layer, rank or domain, pairs across texts, rows lost between chunks."""
    out = tmp_path / "out"
    assert str(out / "report.html") in run(mixtral, *texts, "--out", str(out), "--layers", "0,2")
    found = json.loads((out / "analysis.json").read_text())
    documents = {"code": (CODE, CODE[40:200]), "prose": (PROSE, PROSE[100:])}
    total_LE = np.zeros((3, 8), np.int64)
    for domain, texts_of_it in documents.items():
        chosen = [choices(mixtral, text) for text in texts_of_it]
        every_NLK = np.concatenate(chosen)
        assert found["tokens"][domain] == len(every_NLK)
        for layer in range(3):
            got = found["layers"][layer]["domains"][domain]
            expected_KE = [np.bincount(every_NLK[:, layer, k], minlength=8) / len(every_NLK) for k in range(2)]
            assert np.allclose(got["share_by_choice"], expected_KE, atol=1e-6)
            pairs = [(a, b) for one in chosen for a, b in zip(one[:-1, layer], one[1:, layer], strict=True)]
            assert got["same_first"] == pytest.approx(np.mean([a[0] == b[0] for a, b in pairs]))
            assert got["shared"] == pytest.approx(np.mean([bool(set(a) & set(b)) for a, b in pairs]))
            total_LE[layer] += np.bincount(every_NLK[:, layer].ravel(), minlength=8)
    trace = read_trace(out / "trace.jsonl")
    assert [window.name for window in trace.windows] == ["code", "prose"]
    assert (trace.total().chosen_LE == total_LE).all()
    assert found["random"]["same_first"] == 0.125 and abs(found["random"]["shared"] - 0.46) < 0.005

    charts = sorted(path.name for path in out.glob("*.png"))
    assert charts == [f"{name}.png" for name in
                      ("evenness", "expert_share", "information", "load", "repetition", "together")]  # fmt: skip
    page = Page()
    page.feed((out / "report.html").read_text())
    assert page.tags.count("img") == len(charts) and "script" not in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.fetched)
    assert page.tags.count("span") == 2 * sum(min(400, tokens) for tokens in found["tokens"].values())


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("qwen3_moe", {"mlp_only_layers": [1]}), ("olmoe", {"experts": 16, "top_k": 4}), ("granitemoe", {"top_k": 1})],
)
def test_other_families_and_texts_longer_than_the_context(tmp_path: Path, family: str, sizes: dict[str, int]) -> None:
    """Would catch a layer without experts that shifts the others, and a second part of a text that sees the first."""
    model = save(tmp_path, family, **sizes)
    decoder, tokenizer = build_model(Config(kv_cache_mb=1), model.directory), Tokenizer(model.directory)
    recording = record(
        decoder, tokenizer, [Domain("prose", (PROSE,))], most_tokens=150, max_context=101, max_batch_tokens=64
    )
    ids = tokenizer.encode(PROSE, add_special_tokens=False)[:150]
    assert recording.q_start == (0, 100, 150) and recording.ids_N.tolist() == ids
    sparse = [layer for layer in range(3) if layer not in sizes.get("mlp_only_layers", [])]
    for part in (slice(0, 100), slice(100, 150)):
        theirs = np.stack(gate_choices(model.theirs, [1, *ids[part]]), 1)[1:]
        assert (recording.choices_NLK[part][:, sparse] == theirs).all()
    assert (recording.choices_NLK[:, [layer for layer in range(3) if layer not in sparse]] == -1).all()


def test_what_cannot_be_analysed_is_said_in_one_line(
    mixtral: Model, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--out", str(tmp_path / "out"))
    assert "layer 3 has no experts" in run(mixtral, *texts, *out, "--layers", "0,3", code=1)
    assert "numbers by commas" in run(mixtral, *texts, *out, "--layers", "all", code=1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "cluster.analyze.charts")
    assert "expertmesh[analyze]" in run(mixtral, *texts, *out, code=1)
    assert not (tmp_path / "out").exists()


def test_texts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden").write_text("not counted")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"words": 1}\n')
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.md").write_text("a")
    for names, said in (
        (["gone.txt"], "gone.txt: No such file"), (["binary.txt"], "not UTF-8"), (["empty"], "no text in it"),
        (["bad.jsonl"], "line 2"), (["a.txt", "a.md"], "a domain a already"),
    ):  # fmt: skip
        with pytest.raises(TextError, match=said):
            read_domains([tmp_path / name for name in names])


def test_lines_of_json_may_have_other_separators_in_them(tmp_path: Path) -> None:
    """U+2028 ends no line of JSON, and a mark at the beginning of a file is none of its text."""
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "one\u2028two"}\r\n{"text": "three"}\n', newline="")
    (domain,) = read_domains([tmp_path / "a.jsonl"])
    assert domain.documents == ("one\u2028two", "three")
