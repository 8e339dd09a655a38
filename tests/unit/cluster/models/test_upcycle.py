"""Upcycling: the answers stay those of the dense model, tokens of a kind share experts, and what would come out wrong
is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.errors import CheckpointError
from cluster.models import corpus
from cluster.models.dense import from_directory
from cluster.models.gates import ffn_inputs, fit_gates, spherical_kmeans
from cluster.models.gguf_tokenizer import build_tokenizer
from cluster.models.upcycle import mixture_of, write_upcycled
from tests.tiny_llama import save_llama, write_gguf
from workers.checkpoint import Checkpoint

IDS = torch.tensor([[1, 50, 60, 3, 3, 200, 17, 90, 255, 101, 7, 8]])
TEXT = "def f(x):\n    return x + 1  # 12345 Grüße, 世界!<|im_end|>\nIt's  done.\n\n"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def upcycled_logits(directory: Path) -> Tensor:
    Checkpoint(directory).verify()
    return logits(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))


@pytest.mark.parametrize(
    ("sizes", "experts", "top_k"),
    [
        ({}, 8, 2),
        ({}, 3, 1),
        ({}, 4, 4),
        ({"tie_word_embeddings": True, "num_key_value_heads": 4}, 8, 2),
        ({"head_dim": 24}, 8, 2),
        ({"mistral": True, "sliding_window": 5}, 8, 2),
        ({"dtype": torch.bfloat16}, 8, 2),
    ],
    ids=str,
)
def test_the_answers_are_the_dense_models(tmp_path: Path, sizes: dict[str, Any], experts: int, top_k: int) -> None:
    save_llama(tmp_path / "dense", **sizes)
    write_upcycled(tmp_path / "dense", tmp_path / "moe", n_experts=experts, top_k=top_k)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(upcycled_logits(tmp_path / "moe"), logits(dense), atol=1e-4, rtol=1e-4)
    spec = Checkpoint(tmp_path / "moe").spec
    assert (spec.n_experts, spec.top_k, spec.dtype) == (experts, top_k, sizes.get("dtype", torch.float32))
    assert spec.rope_theta == 777.0 and spec.sliding_window == sizes.get("sliding_window")


def test_tokenizer_template_and_generation_defaults_go_along(tmp_path: Path) -> None:
    source, dest = tmp_path / "dense", tmp_path / "moe"
    save_llama(source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "temperature": 0.5}))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_text("not carried")
    write_upcycled(source, dest)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (dest / name).read_bytes() == (source / name).read_bytes()
    assert not (dest / "pytorch_model.bin").exists()
    assert Checkpoint(dest).spec.eos_ids == (2, 0)


def test_the_dense_forward_pass_is_transformers(tmp_path: Path) -> None:
    """The gates are fitted to what the model really feeds its FFNs."""
    model = save_llama(tmp_path)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    logits(model)
    dense = from_directory(tmp_path)
    spec = mixture_of(dense.spec, n_experts=2, top_k=1)
    for ours_ND, theirs_1TD in zip(ffn_inputs(spec, dense.read, IDS), seen, strict=True):
        torch.testing.assert_close(ours_ND, theirs_1TD[0, 1:], atol=1e-5, rtol=1e-5)


def test_gates_route_by_kind_and_are_peaked(tmp_path: Path) -> None:
    """Every expert is somebody's, code and other languages share few, and the first of two experts weighs 0.7."""
    save_llama(tmp_path)
    dense = from_directory(tmp_path)
    spec = mixture_of(dense.spec, n_experts=8, top_k=2)
    gate_ED = next(fit_gates(spec, dense))
    shares = {}
    first_weights = []
    for kind in ("code", "languages"):
        ids = dense.tokenizer.encode(corpus.read(kind)).ids[:256]
        x_ND = next(ffn_inputs(spec, dense.read, torch.tensor([ids])))
        best = (x_ND @ gate_ED.T).topk(2)
        first_weights.append(best.values.softmax(-1)[:, 0].mean())
        shares[kind] = torch.bincount(best.indices.flatten(), minlength=8) / best.indices.numel()
    assert ((shares["code"] + shares["languages"]) > 0).all()
    assert 0.5 * (shares["code"] - shares["languages"]).abs().sum() > 0.15  # random weights already tell bytes apart
    assert 0.6 < float(torch.stack(first_weights).mean()) < 0.8


def test_kmeans_finds_what_is_apart() -> None:
    directions_KD = torch.eye(4, 16)
    noise = torch.randn(400, 16, generator=torch.Generator().manual_seed(1)) * 0.05
    x_ND = torch.nn.functional.normalize(directions_KD.repeat(100, 1) + noise, dim=-1)
    found_KD = spherical_kmeans(x_ND, 4, torch.Generator().manual_seed(0))
    assert (found_KD @ directions_KD.T > 0.95).sum(0).tolist() == [1, 1, 1, 1]


def test_kmeans_with_fewer_distinct_rows_than_centroids() -> None:
    x_ND = torch.eye(2, 8).repeat(5, 1)
    assert spherical_kmeans(x_ND, 6, torch.Generator().manual_seed(0)).isfinite().all()


# --- GGUF


@pytest.mark.parametrize(
    "sizes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 1}, {"head_dim": 32}], ids=str
)
def test_gguf_round_trip(tmp_path: Path, sizes: dict[str, Any]) -> None:
    """Wrong rotary order, a swapped gate and up, or a lost head would all show in the logits."""
    dense = save_llama(tmp_path / "dense", **sizes)
    write_gguf(tmp_path / "model.gguf", tmp_path / "dense")
    write_upcycled(tmp_path / "model.gguf", tmp_path / "moe", n_experts=4)
    torch.testing.assert_close(upcycled_logits(tmp_path / "moe"), logits(dense), atol=1e-4, rtol=1e-4)
    spec = Checkpoint(tmp_path / "moe").spec
    assert (spec.rope_theta, spec.norm_eps, spec.max_context) == (777.0, 1e-6, 256)
    assert (spec.bos_id, spec.eos_ids, spec.dtype) == (1, (2,), torch.float32)


def test_gguf_tokenizer(tmp_path: Path) -> None:
    save_llama(tmp_path / "dense")
    write_gguf(tmp_path / "model.gguf", tmp_path / "dense")
    write_upcycled(tmp_path / "model.gguf", tmp_path / "moe", n_experts=2)
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("dense", "moe"))
    assert after(TEXT).input_ids == before(TEXT).input_ids
    assert after.decode(after(TEXT).input_ids) == TEXT
    assert (after.bos_token_id, after.eos_token_id) == (1, 2)
    assert after.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"


def test_quantized_gguf(tmp_path: Path) -> None:
    dense = save_llama(tmp_path / "dense")
    write_gguf(tmp_path / "model.gguf", tmp_path / "dense", quantization=gguf.GGMLQuantizationType.Q8_0)
    write_upcycled(tmp_path / "model.gguf", tmp_path / "moe", n_experts=2)
    assert Checkpoint(tmp_path / "moe").spec.dtype == torch.bfloat16
    ours, theirs = upcycled_logits(tmp_path / "moe"), logits(dense)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.99


@pytest.mark.parametrize(
    ("cut", "pieces"),
    [
        ("gpt-2", ["a", "Ġ123", "ĠIt", "'s"]),
        ("smollm", ["a", "Ġ", "1", "2", "3", "ĠIt", "'s"]),
        ("llama-bpe", ["a", "Ġ", "123", "ĠIt", "'s"]),
    ],
)
def test_gguf_pre_tokenizers(cut: str, pieces: list[str]) -> None:
    """How numbers and contractions are cut differs by family; a wrong cut gives other ids than the model knows."""
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": cut, "tokenizer.ggml.merges": [],
              "tokenizer.ggml.tokens": ["a"]}  # fmt: skip
    tokenizer = build_tokenizer(Path("x.gguf"), fields)
    assert tokenizer.pre_tokenizer is not None
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a 123 It's")] == pieces


def test_gguf_begin_of_sequence(tmp_path: Path) -> None:
    """A model that was trained to see it at the start of every text gets it there."""
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": [], "tokenizer.ggml.tokens": ["a", "<s>"],
              "tokenizer.ggml.token_type": [1, 3], "tokenizer.ggml.bos_token_id": 1}  # fmt: skip
    with_bos = build_tokenizer(tmp_path, fields | {"tokenizer.ggml.add_bos_token": True})
    assert with_bos.encode("a").ids == [1, 0]
    assert build_tokenizer(tmp_path, fields).encode("a").ids == [0]


# --- what is refused


def refused(source: Path, dest: Path, *parts: str, n_experts: int = 8) -> None:
    with pytest.raises(CheckpointError) as caught:
        write_upcycled(source, dest, n_experts=n_experts)
    message = str(caught.value)
    for part in (source.name, *parts):
        assert part in message, message
    assert not dest.exists() and not list(dest.parent.glob(".*building*"))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model_type": "qwen2"}, "cannot upcycle architecture 'qwen2'"),
        ({"model_type": "mixtral"}, "cannot upcycle architecture 'mixtral'"),
        ({"attention_bias": True}, "unsupported `attention_bias` True"),
        ({"mlp_bias": True}, "unsupported `mlp_bias` True"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rotary scaling 'longrope'"),
        ({"hidden_act": "gelu"}, "`hidden_act` 'gelu'"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"intermediate_size": 95}, "mlp.gate_proj.weight has shape [96, 64]"),
    ],
    ids=str,
)
def test_a_directory_that_a_mixtral_cannot_match(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    source = tmp_path / "dense"
    save_llama(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    refused(source, tmp_path / "moe", part)


def test_tokenizer_missing_broken_or_of_another_model(tmp_path: Path) -> None:
    source = tmp_path / "dense"
    save_llama(source, vocab_size=280)
    refused(source, tmp_path / "moe", "the model knows 280 tokens")
    (source / "tokenizer.json").write_text("{}")
    refused(source, tmp_path / "moe", "tokenizer.json", "cannot be read")
    (source / "tokenizer.json").unlink()
    refused(source, tmp_path / "moe", "tokenizer.json", "no such file")


def test_more_experts_than_tokens_to_fit_them_to(tmp_path: Path) -> None:
    save_llama(tmp_path / "dense")
    refused(tmp_path / "dense", tmp_path / "moe", "100000 experts", n_experts=100_000)


def test_no_source(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path / "moe", "no such")


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"general.architecture": "qwen2"}, "cannot upcycle architecture 'qwen2'"),
        ({"llama.expert_count": 8}, "mixture of experts already"),
        ({"llama.rope.scaling.type": "yarn"}, "rotary scaling"),
        ({"llama.rope.dimension_count": 8}, "a part of each head"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 3}, "blk.2.attn_norm.weight is missing"),
        ({"llama.feed_forward_length": 95}, "blk.0.ffn_gate.weight has shape [96, 64]"),
        ({"tokenizer.ggml.model": "llama"}, "unsupported tokenizer 'llama'"),
        ({"tokenizer.ggml.pre": "martian"}, "`tokenizer.ggml.pre` 'martian'"),
        ({"tokenizer.ggml.merges": ["no such"]}, "merges do not fit"),
    ],
    ids=str,
)
def test_a_gguf_that_a_mixtral_cannot_match(tmp_path: Path, fields: dict[str, Any], part: str) -> None:
    save_llama(tmp_path / "dense")
    write_gguf(tmp_path / "model.gguf", tmp_path / "dense", **fields)
    refused(tmp_path / "model.gguf", tmp_path / "moe", part)


@pytest.mark.parametrize("keep", [0, 3, 40, 5000])
def test_a_broken_gguf(tmp_path: Path, keep: int) -> None:
    save_llama(tmp_path / "dense")
    path = tmp_path / "model.gguf"
    write_gguf(path, tmp_path / "dense")
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, tmp_path / "moe", "cannot be read as GGUF")


def test_a_truncated_gguf(tmp_path: Path) -> None:
    save_llama(tmp_path / "dense")
    path = tmp_path / "model.gguf"
    write_gguf(path, tmp_path / "dense")
    path.write_bytes(path.read_bytes()[:-1000])
    refused(path, tmp_path / "moe")


def test_our_text_has_every_kind() -> None:
    """Package data that was not shipped would only show at the user's."""
    assert all(len(text) > 2000 for text in corpus.read_all())
