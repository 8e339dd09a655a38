"""Random small models of every family in transformers and in ExpertMesh, from one directory on disk.

The default model's experts are copies of each other, so it cannot show a mis-routed token; these models can: experts,
norms and gates are all distinct and large enough to matter.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from workers.checkpoint import Checkpoint
from workers.kernels.select import formats_for
from workers.model.batch import Batch
from workers.model.decoder import Decoder
from workers.model.kv_cache import KVCache
from workers.shard import ExpertShard, load_shard
from workers.weights import FORMATS

TOLERANCE = 1e-4

BASE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "ffn": 48, "experts": 8, "top_k": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""The model that the shapes vary. Three sizes have names of their own here, since each family names them otherwise."""

# What every family with experts is tried with. Each has something that a bug would break.
_EXPERTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "small_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    "three_experts_top_1": {"experts": 3, "top_k": 1},
    "sixteen_experts_top_4": {"experts": 16, "top_k": 4},
    "all_experts": {"experts": 3, "top_k": 3},
    "odd_sizes": {"hidden_size": 40, "ffn": 37, "vocab_size": 101, "rms_norm_eps": 1e-3},
    "one_layer": {"num_hidden_layers": 1, "experts": 5},
}
_DENSE: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "small_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    "head_dim_larger_than_share": {"head_dim": 24},
    "odd_sizes": {"hidden_size": 40, "ffn": 37, "vocab_size": 101, "rms_norm_eps": 1e-3},
    "one_layer": {"num_hidden_layers": 1},
}

# Scalings that matter within the length of a test: these models were trained on 16 tokens.
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip


@dataclass(frozen=True)
class FamilyCase:
    """How a family is tried: its words for the sizes with names of their own, what it has besides, ten shapes."""

    keys: dict[str, str]
    base: dict[str, Any]
    shapes: dict[str, dict[str, Any]]


_QWEN = {"ffn": "moe_intermediate_size", "experts": "num_experts", "top_k": "num_experts_per_tok"}
_MIXTRAL = {"ffn": "intermediate_size", "experts": "num_local_experts", "top_k": "num_experts_per_tok"}

CASES: dict[str, FamilyCase] = {
    "mixtral": FamilyCase(
        _MIXTRAL,
        {"sliding_window": None},
        _EXPERTS | {
            "head_dim_smaller_than_share": {"head_dim": 6, "num_attention_heads": 6, "num_key_value_heads": 3},
            "window_of_one_block_tied": {"sliding_window": 4, "tie_word_embeddings": True, "num_key_value_heads": 1},
            "window": {"sliding_window": 7},
            "yarn": {"rope_parameters": YARN, "head_dim": 16},
        },
    ),
    "qwen3_moe": FamilyCase(
        _QWEN,
        {"norm_topk_prob": True, "intermediate_size": 112, "head_dim": 16},
        _EXPERTS | {
            "not_normalized": {"norm_topk_prob": False, "head_dim": 24},
            "dense_among_sparse_window": {"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 7},
            "yarn": {"rope_parameters": YARN | {"truncate": False}},
        },
    ),
    "qwen2_moe": FamilyCase(
        _QWEN,
        {"intermediate_size": 112, "shared_expert_intermediate_size": 80},
        _EXPERTS | {
            "normalized_without_bias": {"norm_topk_prob": True, "qkv_bias": False},
            "window_in_every_other_layer_dense_first": {
                "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 4, "decoder_sparse_step": 2,
                "num_hidden_layers": 4,
            },
            "linear": {"rope_parameters": LINEAR},
        },
    ),
    "olmoe": FamilyCase(
        _QWEN | {"ffn": "intermediate_size"},
        {},
        _EXPERTS | {
            "mha_normalized": {"num_key_value_heads": 4, "norm_topk_prob": True},
            "llama3": {"rope_parameters": LLAMA3},
        },
    ),
    "granitemoe": FamilyCase(
        _MIXTRAL,
        {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 1.5},
        _EXPERTS | {
            "mha_residual": {"num_key_value_heads": 4, "residual_multiplier": 1.7, "embedding_multiplier": 1.0},
            "dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
        },
    ),
    "glm4_moe": FamilyCase(
        _QWEN | {"experts": "n_routed_experts"},
        {
            "intermediate_size": 112, "head_dim": 16, "attention_bias": True, "use_qk_norm": True,
            "routed_scaling_factor": 1.8, "n_shared_experts": 1,
        },
        {shape: sizes | {"first_k_dense_replace": 0} for shape, sizes in _EXPERTS.items()} | {
            "dense_first_two_shared": {"first_k_dense_replace": 2, "n_shared_experts": 2, "head_dim": 24},
            "no_bias_no_norm_not_normalized": {
                "attention_bias": False, "use_qk_norm": False, "norm_topk_prob": False, "partial_rotary_factor": 0.25,
            },
            "all_rotated_llama3": {"partial_rotary_factor": 1.0, "rope_parameters": LLAMA3},
        },
    ),
    "llama": FamilyCase(
        {"ffn": "intermediate_size"},
        {},
        _DENSE | {
            "llama3": {"rope_parameters": LLAMA3},
            "linear": {"rope_parameters": LINEAR},
            "dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
        },
    ),
    "mistral": FamilyCase(
        {"ffn": "intermediate_size"},
        {"sliding_window": None},
        _DENSE | {
            "window": {"sliding_window": 7},
            "window_of_one_block_tied": {"sliding_window": 4, "tie_word_embeddings": True, "num_key_value_heads": 1},
            "yarn": {"rope_parameters": YARN | {"attention_factor": 1.3}},
        },
    ),
}  # fmt: skip

EVERY_SHAPE = [(family, shape) for family, case in CASES.items() for shape in case.shapes]


def save_random(
    directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32, family: str = "mixtral", **sizes: Any
) -> PreTrainedModel:
    """Write a random model to `directory` as `dtype` and return transformers' float32 model of it, in eval mode.

    `sizes` are in the words of `BASE`, what is not there in those of the family.
    """
    case = CASES[family]
    values = BASE | case.base | sizes
    config = {case.keys.get(key, key): value for key, value in values.items() if key in case.keys or key not in _OWN}
    # A copy: transformers writes into `rope_parameters`, which the shapes share.
    settings = AutoConfig.for_model(family, **copy.deepcopy(config))
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    _plain(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in (*model.named_parameters(), *model.named_buffers()):
            noise = torch.randn(weight.shape, generator=generator)
            if "bias" in name:
                weight.copy_(0.3 * noise)
            elif "norm" in name:
                weight.copy_(1.0 + 0.3 * noise)
            elif name.endswith(("gate.weight", "router.weight")) or (
                "embed" in name and not model.config.tie_word_embeddings
            ):
                weight.copy_(noise)
            elif "inv_freq" not in name:
                # What logits come from among them: they are of order one in every shape, so one tolerance fits all.
                weight.copy_(noise * weight.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(directory)
    if dtype != torch.float32:  # `to` has rounded the frequencies of the rotary embedding too
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        _plain(model)
    return model


def save_shape(directory: Path, family: str, shape: str, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """`save_random` of one of the shapes of a family, with other `sizes` where they are given."""
    return save_random(directory, seed, family=family, **(CASES[family].shapes[shape] | sizes))


_OWN = ("ffn", "experts", "top_k")


def _plain(model: PreTrainedModel) -> None:
    """Experts one by one: the other implementations refuse odd sizes."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")


class Paged:
    """ExpertMesh's one-process model of a directory, and the bookkeeping a router would do for it.

    Blocks are handed out in random order, so that nothing works by accident of neighbouring blocks.
    """

    def __init__(self, directory: Path, n_blocks: int = 128, block_size: int = 4, widened: bool = False) -> None:
        """`widened`: with float32 copies of whatever the checkpoint holds."""
        checkpoint = Checkpoint(directory)
        self.spec = spec = checkpoint.spec
        every = spec.experts
        shard = ExpertShard(spec, dtype=torch.float32) if widened else load_shard(checkpoint, every, torch.float32)
        for layer, expert in every if widened else ():
            shard.load(layer, expert, checkpoint.expert(layer, expert, FORMATS["float32"]))
        keep = () if widened else formats_for("cpu", torch.float32)
        self.cache = KVCache(spec, n_blocks, block_size, torch.float32)
        for pool in (*self.cache.k, *self.cache.v):
            pool.fill_(float("nan"))  # what was never written must never count
        self.model = Decoder(spec, checkpoint.dense(torch.float32, keep), shard, self.cache)
        self.free = list(range(n_blocks))
        random.Random(0).shuffle(self.free)
        self.blocks: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def batch(self, rows: Mapping[str, Sequence[int]], last_only: bool = False) -> Batch:
        """Append tokens to the named sequences; the batch that computes them."""
        size, positions, slots, q_start, logit_rows = self.cache.block_size, [], [], [0], []
        for name, token_ids in rows.items():
            blocks, first = self.blocks.setdefault(name, []), self.lengths.get(name, 0)
            context = self.lengths[name] = first + len(token_ids)
            while len(blocks) * size < context:
                blocks.append(self.free.pop())
            positions += range(first, context)
            slots += [blocks[position // size] * size + position % size for position in range(first, context)]
            logit_rows += (
                [q_start[-1] + len(token_ids) - 1] if last_only else range(len(slots) - len(token_ids), len(slots))
            )
            q_start.append(len(slots))
        width = max(len(self.blocks[name]) for name in rows)
        return Batch(
            token_ids_T=torch.tensor([token for token_ids in rows.values() for token in token_ids]),
            positions_T=torch.tensor(positions),
            slots_T=torch.tensor(slots),
            q_start=tuple(q_start),
            context_S=torch.tensor([self.lengths[name] for name in rows], dtype=torch.int32),
            block_table_SB=torch.tensor(
                [self.blocks[name] + [-1] * (width - len(self.blocks[name])) for name in rows], dtype=torch.int32
            ),
            logit_rows_R=torch.tensor(logit_rows),
        )

    def step(self, rows: Mapping[str, Sequence[int]], last_only: bool = False, micro_batches: int = 1) -> list[Tensor]:
        """Logits of each sequence's new rows (or of its last one only), in the order of `rows`."""
        logits_RV = self.model.forward(self.batch(rows, last_only).split(micro_batches))
        return list(logits_RV.split([1 if last_only else len(token_ids) for token_ids in rows.values()]))


def random_tokens(vocab_size: int, n: int, seed: int) -> list[int]:
    """`n` token ids."""
    return torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def reference_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """transformers' logits [T, V] of every position, without any cache.

    With dynamic scaling token by token, as they are generated: computed at once all tokens would be rotated by the
    frequencies of the longest context.
    """
    ids_1T = torch.tensor([list(token_ids)])
    if (model.config.rope_parameters or {}).get("rope_type") != "dynamic":
        return model(ids_1T, use_cache=False).logits[0].float()
    cache = DynamicCache(config=model.config)
    return torch.cat([model(token_11, cache=cache).logits[0] for token_11 in ids_1T.split(1, dim=1)])


@torch.no_grad()
def gate_margins(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """Per position [T], how far the last expert chosen is ahead of the first one not chosen, in the closest layer.

    Where that is within float32's noise either choice is right, and what follows differs by far more than noise.
    """
    top_k, margins = getattr(model.config, "num_experts_per_tok", 0), []

    def note(gate: torch.nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        logits_TE = inputs[0].reshape(-1, inputs[0].shape[-1]) @ gate.weight.T
        if (bias_E := getattr(gate, "e_score_correction_bias", None)) is not None:
            logits_TE = logits_TE.sigmoid() + bias_E
        best_TE = logits_TE.sort(dim=-1, descending=True).values
        if top_k < best_TE.shape[-1]:
            margins.append(best_TE[:, top_k - 1] - best_TE[:, top_k])

    gates = [module for name, module in model.named_modules() if name.endswith((".mlp.gate", ".router"))]
    if not gates:
        return torch.full((len(token_ids),), torch.inf)
    hooks = [gate.register_forward_hook(note) for gate in gates]
    model(torch.tensor([list(token_ids)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(margins).amin(0) if margins else torch.full((len(token_ids),), torch.inf)


@torch.no_grad()
def gate_choices(model: PreTrainedModel, token_ids: Sequence[int]) -> list[NDArray[np.int64]]:
    """By layer, the experts that transformers' gate chooses for each position, int64 [T, K], best first.

    From the logits of its router; of equal ones the lower expert comes first. For gates with a softmax.
    """
    top_k = model.config.num_experts_per_tok
    ids_1T = torch.tensor([list(token_ids)])
    layers = model(ids_1T, use_cache=False, output_router_logits=True).router_logits
    sorted_TE = (torch.sort(logits_TE.float(), dim=-1, descending=True, stable=True) for logits_TE in layers)
    return [ranked.indices[:, :top_k].numpy() for ranked in sorted_TE]
