"""A checkpoint as a float32 GGUF file without a vocabulary: what llama.cpp needs to compute it."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from torch import Tensor

from workers.checkpoint import Checkpoint
from workers.errors import CheckpointError
from workers.weights import FORMATS


def write_gguf(directory: Path, dest: Path) -> None:
    """Convert the Mixtral at `directory`."""
    checkpoint = Checkpoint(directory)
    spec, dense = checkpoint.spec, checkpoint.dense(torch.float32)
    if spec.family != "mixtral" or spec.rope_scaling is not None:
        raise CheckpointError(f"{directory}: only a Mixtral without rotary scaling is converted for llama.cpp")
    writer = gguf.GGUFWriter(dest, "llama")
    writer.add_vocab_size(spec.vocab_size)
    writer.add_context_length(spec.max_context)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.n_layers)
    writer.add_feed_forward_length(spec.ffn_size)
    writer.add_head_count(spec.n_heads)
    writer.add_head_count_kv(spec.n_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_expert_count(spec.n_experts)
    writer.add_expert_used_count(spec.top_k)
    writer.add_tokenizer_model("none")

    def add(name: str, tensor: Tensor) -> None:
        writer.add_tensor(f"{name}.weight", tensor.numpy())

    add("token_embd", dense.embed_VD)
    add("output_norm", dense.norm_D)
    add("output", dense.head_VD)
    for index, layer in enumerate(dense.layers):
        add(f"blk.{index}.attn_norm", layer.input_norm_D)
        add(f"blk.{index}.attn_q", interleaved(layer.q, spec.n_heads))
        add(f"blk.{index}.attn_k", interleaved(layer.k, spec.n_kv_heads))
        add(f"blk.{index}.attn_v", layer.v)
        add(f"blk.{index}.attn_output", layer.o)
        add(f"blk.{index}.ffn_norm", layer.post_norm_D)
        assert layer.gate_ED is not None
        add(f"blk.{index}.ffn_gate_inp", layer.gate_ED)
        experts = [checkpoint.expert(index, expert, FORMATS["float32"]) for expert in range(spec.n_experts)]
        add(f"blk.{index}.ffn_gate_exps", torch.stack([expert.w1_FD for expert in experts]))
        add(f"blk.{index}.ffn_down_exps", torch.stack([expert.w2_DF for expert in experts]))
        add(f"blk.{index}.ffn_up_exps", torch.stack([expert.w3_FD for expert in experts]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight_CD: Tensor, n_heads: int) -> Tensor:
    """Rows in the order of llama.cpp's rotary embedding, which pairs neighbours instead of halves."""
    halves = weight_CD.view(n_heads, 2, -1, weight_CD.shape[1])
    return halves.transpose(1, 2).reshape(weight_CD.shape).contiguous()
