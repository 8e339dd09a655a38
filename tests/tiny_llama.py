"""Tiny dense Llamas with a real tokenizer, as Hugging Face directories and as GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from cluster.models.tokenizer import write_tokenizer

VOCABULARY = 320
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def save_llama(
    directory: Path, *, mistral: bool = False, dtype: torch.dtype = torch.float32, **sizes: Any
) -> LlamaForCausalLM | MistralForCausalLM:
    """Write a random dense model with tokenizer to `directory`; returns it."""
    base: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1,
        "eos_token_id": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
    }  # fmt: skip
    torch.manual_seed(0)
    model: Any
    if mistral:
        model = MistralForCausalLM(MistralConfig(**(base | sizes)))
    else:
        model = LlamaForCausalLM(LlamaConfig(**(base | sizes)))
    for name, weight in model.named_parameters():
        weight.data.copy_(1 + 0.2 * torch.randn(weight.shape) if "norm" in name else 0.2 * torch.randn(weight.shape))
    model = model.to(dtype).eval()
    model.save_pretrained(directory)
    write_tokenizer(directory, VOCABULARY)
    return model


def write_gguf(
    path: Path, directory: Path, *, quantization: gguf.GGMLQuantizationType | None = None, **fields: Any
) -> None:
    """Write the model in `directory` as a GGUF file, the way converters do; `fields` change or add metadata.

    Matrices are stored with `quantization`; None keeps them float32.
    """
    config = json.loads((directory / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    bpe = json.loads((directory / "tokenizer.json").read_text())["model"]
    size = tokenizer.get_vocab_size()
    tokens = [tokenizer.id_to_token(i) if i < size else f"[unused{i}]" for i in range(config["vocab_size"])]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    metadata: dict[str, Any] = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.key_length": config["head_dim"] or config["hidden_size"] // heads,
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_parameters"]["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in bpe["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    } | fields
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", "llama"))
    for name, value in metadata.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        if value is not None:
            add[type(value)](name, value)
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if "q_proj" in name or "k_proj" in name:
            weight = _pairs(weight, heads if "q_proj" in name else kv_heads)
        array = weight.contiguous().numpy()
        if quantization is not None and array.ndim == 2:
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(array, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(_gguf_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES[part]}.weight"
    return f"{_GGUF_NAMES[stem]}.weight"


def _pairs(weight: Tensor, heads: int) -> Tensor:
    """The rotary order of GGUF: element i of a head and its partner i + n/2 lie side by side."""
    rows, columns = weight.shape
    half = rows // heads // 2
    order = [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in range(2)]
    return weight[order].reshape(rows, columns)
