"""Random small Mixtrals in transformers and in ExpertMesh, from one directory on disk.

The default model's experts are copies of each other, so it cannot show a mis-routed token; these models can: experts,
norms and gates are all distinct and large enough to matter.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from workers.checkpoint import Checkpoint
from workers.kernels.select import ops_for
from workers.model.batch import Batch
from workers.model.decoder import Decoder
from workers.model.kv_cache import KVCache
from workers.shard import ExpertShard, load_shard

TOLERANCE = 1e-4

# Each shape has something that a bug would break; sizes are odd where they may be.
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "head_dim_larger_than_share": {"head_dim": 24},
    "head_dim_smaller_than_share": {"head_dim": 6, "num_attention_heads": 6, "num_key_value_heads": 3},
    "tied": {"tie_word_embeddings": True},
    "window": {"sliding_window": 7},
    "window_of_one_block_tied": {"sliding_window": 4, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "small_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    "three_experts_top_1": {"num_local_experts": 3, "num_experts_per_tok": 1},
    "sixteen_experts_top_4": {"num_local_experts": 16, "num_experts_per_tok": 4},
    "all_experts": {"num_local_experts": 3, "num_experts_per_tok": 3},
    "odd_sizes": {"hidden_size": 52, "intermediate_size": 37, "vocab_size": 101, "head_dim": 10, "rms_norm_eps": 1e-3},
    "one_layer": {"num_hidden_layers": 1, "num_local_experts": 5},
}


def save_random(directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> MixtralForCausalLM:
    """Write a random Mixtral to `directory` as `dtype` and return transformers' float32 model of it, in eval mode."""
    base = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None,
    }  # fmt: skip
    model = MixtralForCausalLM(MixtralConfig(**(base | sizes))).float().eval()
    model.set_experts_implementation("eager")  # the others refuse odd sizes
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1.0 + 0.3 * noise)
            elif "gate.weight" in name or ("embed" in name and not model.config.tie_word_embeddings):
                weight.copy_(noise)
            else:  # what logits come from among them: they are of order one in every shape, so one tolerance fits all
                weight.copy_(noise * weight.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(directory)
    if dtype != torch.float32:  # `to` has rounded the frequencies of the rotary embedding too
        model = MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        model.set_experts_implementation("eager")
    return model


class Paged:
    """ExpertMesh's one-process model of a directory, and the bookkeeping a router would do for it.

    Blocks are handed out in random order, so that nothing works by accident of neighbouring blocks.
    """

    def __init__(self, directory: Path, n_blocks: int = 128, block_size: int = 4, widened: bool = False) -> None:
        """`widened`: with float32 copies of whatever the checkpoint holds."""
        checkpoint = Checkpoint(directory)
        self.spec = spec = checkpoint.spec
        every = list(product(range(spec.n_layers), range(spec.n_experts)))
        shard = ExpertShard(spec, dtype=torch.float32) if widened else load_shard(checkpoint, every, torch.float32)
        for layer, expert in every if widened else ():
            shard.load(layer, expert, checkpoint.expert(layer, expert, torch.float32))
        keep = () if widened else ops_for("cpu", torch.float32).stored_dtypes
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
def reference_logits(model: MixtralForCausalLM, token_ids: Sequence[int]) -> Tensor:
    """transformers' logits [T, V] of every position, without any cache."""
    return model(torch.tensor([list(token_ids)]), use_cache=False).logits[0].float()


@torch.no_grad()
def gate_margins(model: MixtralForCausalLM, token_ids: Sequence[int]) -> Tensor:
    """Per position [T], how far the last expert chosen is ahead of the first one not chosen, in the closest layer.

    Where that is within float32's noise either choice is right, and what follows differs by far more than noise.
    """
    top_k, margins = model.config.num_experts_per_tok, []

    def note(gate: torch.nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        logits_TE = inputs[0].reshape(-1, inputs[0].shape[-1]) @ gate.weight.T
        best_TE = logits_TE.sort(dim=-1, descending=True).values
        if top_k < best_TE.shape[-1]:
            margins.append(best_TE[:, top_k - 1] - best_TE[:, top_k])

    hooks = [layer.mlp.gate.register_forward_hook(note) for layer in model.model.layers]
    reference_logits(model, token_ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(margins).amin(0) if margins else torch.full((len(token_ids),), torch.inf)
