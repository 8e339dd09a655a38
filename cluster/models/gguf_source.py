"""A dense Llama in a GGUF file: its sizes, its tensors dequantized, its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from cluster.errors import CheckpointError
from cluster.models.dense import DenseSource
from cluster.models.gguf_tokenizer import build_tokenizer
from cluster.models.tokenizer import tokenizer_config
from cluster.models.writer import write_json
from workers.families.registry import spec_of
from workers.families.tensors import Shape

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_STORED_AS = {"F32": "float32", "F16": "float16"}  # everything else, quantized: bfloat16


def from_gguf(path: Path) -> DenseSource:
    """A GGUF file. Raises CheckpointError when it is broken or holds anything but a plain dense Llama."""
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: _plain(field.contents()) for name, field in reader.fields.items()}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path}: cannot be read as GGUF: {error}") from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, fields, tensors)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def read(name: str, shape: Shape) -> Tensor:
        gguf_name = _gguf_name(name)
        if gguf_name not in tensors:
            raise CheckpointError(f"{path}: tensor {gguf_name} is missing")
        tensor = tensors[gguf_name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{path}: tensor {gguf_name} ({tensor.tensor_type.name}): {error}") from None
        if values.shape != shape:
            raise CheckpointError(
                f"{path}: tensor {gguf_name} has shape {list(values.shape)}; its sizes make it {list(shape)}"
            )
        n_heads = heads.get(name.split(".")[-2])
        values_copy = torch.from_numpy(np.array(values, dtype=np.float32))
        return values_copy if n_heads is None else _halves(values_copy, n_heads)

    tokenizer = build_tokenizer(path, fields)

    def carry(dest: Path) -> None:
        tokens = fields["tokenizer.ggml.tokens"]
        bos, eos = config["bos_token_id"], config["eos_token_id"]
        tokenizer.save(str(dest / "tokenizer.json"))
        write_json(
            dest / "tokenizer_config.json",
            tokenizer_config(
                None if bos is None else tokens[bos], tokens[eos[0]] if eos else None,
                fields.get("tokenizer.chat_template"),
            ),
        )  # fmt: skip
        write_json(dest / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})

    return DenseSource(origin=path, spec=spec_of(config, path), read=read, tokenizer=tokenizer, carry=carry)


def _config(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a Llama's `config.json`."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path}: cannot upcycle architecture {architecture!r}; supported: llama")
    if fields.get("llama.expert_count"):
        raise CheckpointError(f"{path}: is a mixture of experts already")
    if fields.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensors:
        raise CheckpointError(f"{path}: rotary scaling is not supported")
    bias = next((name for name in tensors if name.endswith(".bias")), None)
    if bias is not None:
        raise CheckpointError(f"{path}: tensor {bias}: a Mixtral has no biases")
    try:
        n_heads = fields["llama.attention.head_count"]
        head_dim = fields.get("llama.attention.key_length") or fields["llama.embedding_length"] // n_heads
        eos_ids = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
        config = {
            "model_type": "llama",
            "hidden_size": fields["llama.embedding_length"],
            "num_hidden_layers": fields["llama.block_count"],
            "num_attention_heads": n_heads,
            "num_key_value_heads": fields.get("llama.attention.head_count_kv", n_heads),
            "head_dim": head_dim,
            "intermediate_size": fields["llama.feed_forward_length"],
            "vocab_size": len(fields["tokenizer.ggml.tokens"]),
            "rope_theta": fields.get("llama.rope.freq_base", 1e4),
            "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
            "max_position_embeddings": fields["llama.context_length"],
            "tie_word_embeddings": "output.weight" not in tensors,
            "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": list(dict.fromkeys(token for token in eos_ids if token is not None)),
            "torch_dtype": _STORED_AS.get(tensors["token_embd.weight"].tensor_type.name, "bfloat16"),
        }
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]} is missing") from None
    if fields.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(f"{path}: rotary embedding of a part of each head is not supported")
    return config


def _gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        layer, part = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{_NAMES[part]}.weight"
    return f"{_NAMES[stem]}.weight"


def _halves(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of each head from GGUF's rotary pairs (0, 1), (2, 3), ... to Hugging Face's (0, n/2), (1, n/2 + 1), ..."""
    rows, columns = weight.shape
    return weight.view(n_heads, rows // n_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _plain(value: Any) -> Any:
    """Floats are float32 in the file: 1e-05 is meant where 9.999999747378752e-06 is read."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
