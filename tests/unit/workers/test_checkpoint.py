"""Checkpoint: every layout, dtype and sharding gives transformers' own tensors; only what is asked for is read; every
defect is one error with file and tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from workers.checkpoint import Checkpoint, DenseWeights, ExpertWeights
from workers.errors import CheckpointError
from workers.weights import FORMATS, format_of

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip
LAYOUTS = {
    "per_expert": {},
    "fused": {"save_original_format": False},
    "sharded": {"max_shard_size": "4KB"},
    "fused_sharded": {"save_original_format": False, "max_shard_size": "4KB"},
}
EXPERT_BYTES = 3 * 16 * 24 * 4
FIRST_EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


def save(directory: Path, layout: str = "per_expert", dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**(SIZES | sizes))).to(dtype)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    model.save_pretrained(directory, **LAYOUTS[layout])
    return model


def assert_same(checkpoint: Checkpoint, model: Any, dtype: torch.dtype) -> None:
    """All that the checkpoint gives, against the live model's parameters."""
    dense = checkpoint.dense(dtype)
    pairs = [
        (dense.embed_VD, model.model.embed_tokens),
        (dense.norm_D, model.model.norm),
        (dense.head_VD, model.lm_head),
    ]
    for ours, theirs in zip(dense.layers, model.model.layers, strict=True):
        attention = theirs.self_attn
        pairs += [
            (ours.input_norm_D, theirs.input_layernorm), (ours.post_norm_D, theirs.post_attention_layernorm),
            (ours.q, attention.q_proj), (ours.k, attention.k_proj), (ours.v, attention.v_proj),
            (ours.o, attention.o_proj), (ours.gate_ED, theirs.mlp.gate),
        ]  # fmt: skip
    for tensor, module in pairs:
        assert tensor.dtype == dtype
        assert torch.equal(tensor, module.weight.to(dtype))
    for layer, block in enumerate(model.model.layers):
        for number in range(checkpoint.spec.n_experts):
            expert = checkpoint.expert(layer, number, format_of(dtype))
            w1_FD, w3_FD = block.mlp.experts.gate_up_proj[number].chunk(2)
            assert torch.equal(expert.w1_FD, w1_FD.to(dtype))
            assert torch.equal(expert.w3_FD, w3_FD.to(dtype))
            assert torch.equal(expert.w2_DF, block.mlp.experts.down_proj[number].to(dtype))
            assert expert.w1_FD.is_contiguous() and expert.w2_DF.is_contiguous() and expert.w3_FD.is_contiguous()


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_matrices_may_stay_as_stored_and_vectors_do_not(tmp_path: Path, layout: str) -> None:
    """Also where a tensor differs from the others: a gate in float32, one expert in another dtype."""
    half, keep = torch.bfloat16, {FORMATS["bfloat16"], FORMATS["float16"]}
    model = save(tmp_path / "all", layout, half)
    checkpoint = Checkpoint(tmp_path / "all")
    dense = checkpoint.dense(torch.float32, keep)
    assert checkpoint.expert_format.dtype == half
    assert dense.embed_VD.dtype == dense.head_VD.dtype == dense.layers[1].gate_ED.dtype == half
    assert torch.equal(dense.layers[0].q, model.model.layers[0].self_attn.q_proj.weight)
    assert dense.norm_D.dtype == dense.layers[0].input_norm_D.dtype == torch.float32
    assert checkpoint.dense(torch.float32, {FORMATS["float16"]}).embed_VD.dtype == torch.float32
    assert checkpoint.dense_bytes(torch.float32, keep) < checkpoint.dense_bytes(torch.float32)

    model.model.layers[1].mlp.gate.float()
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.data = experts.down_proj.data.half()
    model.save_pretrained(tmp_path / "mixed", **LAYOUTS[layout])
    mixed = Checkpoint(tmp_path / "mixed")
    assert mixed.expert_format == FORMATS["float32"]
    dense = mixed.dense(torch.float32, keep)
    assert (dense.layers[0].gate_ED.dtype, dense.layers[1].gate_ED.dtype) == (half, torch.float32)
    wider = 2 * dense.layers[1].gate_ED.numel()
    assert mixed.dense_bytes(torch.float32, keep) == checkpoint.dense_bytes(torch.float32, keep) + wider


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_layout_and_dtype(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    model = save(tmp_path, layout, dtype)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.verify()
    assert checkpoint.spec.dtype == dtype
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("sharded" in layout)
    for asked in (dtype, torch.float32, torch.bfloat16):
        assert_same(checkpoint, model, asked)


@pytest.mark.parametrize(
    "sizes",
    [{"tie_word_embeddings": True}, {"head_dim": 6}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}],
    ids=str,
)
def test_shapes(tmp_path: Path, sizes: dict[str, Any]) -> None:
    model = save(tmp_path, **sizes)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.verify()
    assert_same(checkpoint, model, torch.float32)


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    """Two copies would double the router's largest tensor."""
    save(tmp_path / "tied", tie_word_embeddings=True)
    save(tmp_path / "untied")
    tied, untied = (Checkpoint(tmp_path / name).dense(torch.bfloat16) for name in ("tied", "untied"))
    assert tied.head_VD is tied.embed_VD
    assert untied.head_VD is not untied.embed_VD


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    """As in transformers; an index left over from before a conversion must not mix two models."""
    model = save(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert_same(Checkpoint(tmp_path), model, torch.float32)


# --- only what is asked for is read


def dense_bytes(dense: DenseWeights) -> int:
    tensors = [dense.embed_VD, dense.norm_D, *([] if dense.head_VD is dense.embed_VD else [dense.head_VD])]
    tensors += [getattr(layer, field.name) for layer in dense.layers for field in fields(layer)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shard_reads_its_experts_alone(tmp_path: Path, layout: str) -> None:
    save(tmp_path, layout)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.verify()
    assert checkpoint.bytes_read == 0
    for layer, expert in ((0, 1), (1, 2)):
        checkpoint.expert(layer, expert, FORMATS["bfloat16"])
    assert checkpoint.bytes_read == 2 * EXPERT_BYTES


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_router_reads_the_dense_half_alone(tmp_path: Path, layout: str, tied: bool) -> None:
    save(tmp_path, layout, tie_word_embeddings=tied)
    checkpoint = Checkpoint(tmp_path)
    assert dense_bytes(checkpoint.dense(torch.float32)) == checkpoint.bytes_read


def system_bytes_read() -> int:
    """What this process had the system read, by any call."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's accounting")
@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_the_system_confirms_what_was_read(tmp_path: Path, layout: str) -> None:
    """`bytes_read` is our own count; this one is the kernel's, and a mapped file would not show up in either."""
    save(tmp_path, layout, hidden_size=128, intermediate_size=512)
    checkpoint = Checkpoint(tmp_path)
    expert_bytes = 3 * 128 * 512 * 4
    before = system_bytes_read()
    checkpoint.expert(1, 2, FORMATS["float32"])
    assert expert_bytes <= system_bytes_read() - before < expert_bytes + 8192


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's accounting")
def test_no_mapping_of_the_file_stays(tmp_path: Path) -> None:
    """A mapped file would count as the worker's memory."""
    save(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    kept = checkpoint.dense(torch.float32), checkpoint.expert(0, 0, FORMATS["float32"])
    assert "model.safetensors" not in Path("/proc/self/maps").read_text()
    assert not [file for file in psutil.Process().open_files() if file.path.endswith("model.safetensors")]
    assert kept


# --- every defect is one error


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(directory: Path, *parts: str) -> None:
    """Opening or verifying fails with one line that names each of `parts`."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(directory).verify()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    "name", [FIRST_EXPERT, "model.layers.1.block_sparse_moe.gate.weight", "lm_head.weight", "model.norm.weight",
             "model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"]
)  # fmt: skip
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    refused(tmp_path, "model.safetensors", name, "missing")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.down_proj", "model.layers.0.mlp.gate.weight"])
def test_missing_fused_tensor(tmp_path: Path, name: str) -> None:
    save(tmp_path, "fused")
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    refused(tmp_path, "model.safetensors", name, "missing")


@pytest.mark.parametrize("shape", [(24, 15), (16, 24), (24 * 16,), (24, 16, 1)])
def test_wrong_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({FIRST_EXPERT: torch.zeros(shape)}))
    refused(tmp_path, "model.safetensors", FIRST_EXPERT, str(list(shape)), "[24, 16]")


def test_wrong_dtype(tmp_path: Path) -> None:
    save(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({FIRST_EXPERT: tensors[FIRST_EXPERT].to(torch.float8_e4m3fn)}))
    refused(tmp_path, "model.safetensors", FIRST_EXPERT, "F8_E4M3")


def test_more_experts_in_the_config_than_in_the_file(tmp_path: Path) -> None:
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_local_experts": 4}))
    refused(tmp_path, "model.safetensors", "gate.weight", "[3, 16]", "[4, 16]")


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("missing", [1, 1000])
def test_truncated_file(tmp_path: Path, layout: str, missing: int) -> None:
    save(tmp_path, layout)
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - missing)
    refused(tmp_path, str(path), "truncated", "tensor ")


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_truncated_header(tmp_path: Path, size: int) -> None:
    save(tmp_path)
    os.truncate(tmp_path / "model.safetensors", size)
    refused(tmp_path, "model.safetensors", "truncated")


def test_truncated_shard_of_many(tmp_path: Path) -> None:
    save(tmp_path, "sharded")
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    os.truncate(path, path.stat().st_size - 4)
    refused(tmp_path, path.name, "truncated", "tensor ")


def test_missing_shard(tmp_path: Path) -> None:
    save(tmp_path, "sharded")
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    path.unlink()
    refused(tmp_path, path.name, "no such file")


def edit_index(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_tensor_missing_from_the_index(tmp_path: Path) -> None:
    save(tmp_path, "sharded")
    edit_index(tmp_path, lambda index: index["weight_map"].pop(FIRST_EXPERT))
    refused(tmp_path, "model.safetensors.index.json", FIRST_EXPERT)


def test_index_that_names_the_wrong_file(tmp_path: Path) -> None:
    save(tmp_path, "sharded")
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    wrong = next(file for file in files if FIRST_EXPERT not in load_file(tmp_path / file))
    edit_index(tmp_path, lambda index: index["weight_map"].update({FIRST_EXPERT: wrong}))
    refused(tmp_path, wrong, FIRST_EXPERT, "missing")


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd.safetensors", "..", "", "model.bin", 3])
def test_index_that_points_outside(tmp_path: Path, file: object) -> None:
    """A downloaded index must not make us open another file."""
    save(tmp_path, "sharded")
    edit_index(tmp_path, lambda index: index["weight_map"].update({FIRST_EXPERT: file}))
    refused(tmp_path, "model.safetensors.index.json", FIRST_EXPERT, "not a safetensors file")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}'])
def test_broken_index(tmp_path: Path, text: str) -> None:
    save(tmp_path, "sharded")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "model.safetensors.index.json")


def with_header(directory: Path, header: bytes, data: bytes = b"") -> None:
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [40, 16], "data_offsets": [8, 4]},
        {"dtype": "F32", "shape": [40, 16], "data_offsets": [-4, 4]},
        {"dtype": "F32", "shape": [40, 16], "data_offsets": [0]},
        {"dtype": "F32", "shape": [40, 16], "data_offsets": [0, 1.5]},
        {"dtype": "F32", "shape": [40, 16], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": ["a", 16], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": 3, "data_offsets": [0, 16]},
        {"dtype": 7, "shape": [40, 16], "data_offsets": [0, 16]},
        {"shape": [40, 16], "data_offsets": [0, 16]},
        None,
        [],
    ],
    ids=str,
)
def test_broken_header_entry(tmp_path: Path, entry: object) -> None:
    """Nothing that a header claims is believed: offsets, shapes and sizes must agree."""
    save(tmp_path)
    with_header(tmp_path, json.dumps({"model.embed_tokens.weight": entry}).encode(), bytes(16))
    refused(tmp_path, "model.safetensors", "model.embed_tokens.weight")


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b"\xff\xff", b"null"])
def test_broken_header(tmp_path: Path, header: bytes) -> None:
    save(tmp_path)
    with_header(tmp_path, header)
    refused(tmp_path, "model.safetensors", "not a safetensors file")


def test_a_tensor_that_is_there_twice(tmp_path: Path) -> None:
    """JSON readers take the last one without a word; another program may take the first."""
    save(tmp_path)
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    with_header(tmp_path, f'{{"model.norm.weight": {entry}, "model.norm.weight": {entry}}}'.encode(), bytes(4))
    refused(tmp_path, "model.safetensors", "'model.norm.weight' is there twice")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
    )
    refused(tmp_path, "model.safetensors.index.json", "'a' is there twice")


@pytest.mark.parametrize(("begin", "part"), [(4, "within tensor a"), (0, "within tensor b"), (8, "")])
def test_tensors_that_overlap(tmp_path: Path, begin: int, part: str) -> None:
    """A file whose tensors share bytes is damaged or means harm. Sound ones touch, in any order of the header."""
    save(tmp_path)
    entries = {
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [begin, begin + 8]},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "empty": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]},
    }
    with_header(tmp_path, json.dumps(entries).encode(), bytes(16))
    refused(tmp_path, "model.safetensors", part or "model.embed_tokens.weight is missing")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [FIRST_EXPERT, "model.norm.weight"])
def test_weights_that_are_no_numbers(tmp_path: Path, name: str, value: float) -> None:
    """One of them makes every answer that meets it nonsense; whoever wants that says so."""
    save(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))

    def read(checkpoint: Checkpoint) -> None:
        checkpoint.verify()
        checkpoint.dense(torch.float32)
        checkpoint.expert(0, 0, FORMATS["float32"])

    read(Checkpoint(tmp_path))
    with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor {name} has NaN or infinite values"):
        read(Checkpoint(tmp_path, finite=True))


def test_large_weights_are_numbers(tmp_path: Path) -> None:
    """Their sum is infinite in float32, they are not."""
    save(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors[FIRST_EXPERT].fill_(3e38))
    assert float(Checkpoint(tmp_path, finite=True).expert(0, 0, FORMATS["float32"]).w1_FD[0, 0]) == pytest.approx(3e38)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    """A repository cloned without its large files has a text of 130 bytes instead."""
    save(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(tmp_path, "model.safetensors", "git lfs pull")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickle_checkpoint(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    refused(tmp_path, name, "pickle")


def test_no_weights(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "model.safetensors", "no such file")


def test_no_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere")


def test_file_that_shrinks_after_it_was_verified(tmp_path: Path) -> None:
    """Short reads end in an error, not in a tensor of leftover memory."""
    save(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.verify()
    os.truncate(tmp_path / "model.safetensors", 3000)
    with pytest.raises(CheckpointError, match="ends within tensor"):
        checkpoint.dense(torch.float32)


def test_weights_own_their_memory(tmp_path: Path) -> None:
    """A tensor that is a view of a larger one would keep the larger one alive."""
    save(tmp_path, "fused")
    expert: ExpertWeights = Checkpoint(tmp_path).expert(1, 1, FORMATS["float32"])
    for field in fields(expert):
        tensor = getattr(expert, field.name)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
