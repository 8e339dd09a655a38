"""Gates for experts that are copies of one FFN: tokens of a kind go to experts of a kind.

A gate row is a centroid of the layer's normalised FFN inputs over a mixed text. All those inputs share one large
direction that tells nothing about the kind of a token, so it is projected out first: the centroids are orthogonal to
it, and the gate needs no bias.

Shape legend: C chunks of text, T tokens of a chunk, N tokens in all, D hidden size, E experts, H heads, A head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import CheckpointError
from cluster.models import corpus
from cluster.models.dense import DenseSource
from workers.families.tensors import Shape
from workers.model.rope import Rope
from workers.spec import ModelSpec

Read = Callable[[str, Shape], Tensor]

_CHUNK = 128  # tokens of context: enough to know the kind of a text
_TOKENS_PER_KIND = 1024
_ITERATIONS = 20
_FIRST_SHARE = 0.7  # mean weight of the better expert of the two best: peaked, yet both count


def fit_gates(spec: ModelSpec, source: DenseSource, *, seed: int = 0) -> Iterator[Tensor]:
    """The gates [E, D] float32 of layer 0, 1, ..., for the dense model `source`.

    Raises CheckpointError when the tokenizer's ids do not fit the model or the text is too short for so many experts.
    """
    ids_CT = _encode_corpus(spec, source)
    generator = torch.Generator().manual_seed(seed)
    for x_ND in ffn_inputs(spec, source.read, ids_CT):
        yield _gate(x_ND, spec.n_experts, generator)


def ffn_inputs(spec: ModelSpec, read: Read, ids_CT: Tensor) -> Iterator[Tensor]:
    """Run the dense model over `ids_CT` in float32; yield each layer's FFN inputs (after the norm) as [N, D].

    The first token of each chunk is left out: models park surplus attention there, and it is like no other token.
    """
    hidden, q, kv = spec.hidden_size, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    h_CTD = F.embedding(ids_CT, read("model.embed_tokens.weight", (spec.vocab_size, hidden)).float())
    cos_TA, sin_TA = Rope(spec, ids_CT.device).angles(torch.arange(ids_CT.shape[1]))
    for layer in range(spec.n_layers):

        def weight(name: str, *shape: int, layer: int = layer) -> Tensor:
            return read(f"model.layers.{layer}.{name}.weight", shape).float()

        x_CTD = F.rms_norm(h_CTD, (hidden,), weight("input_layernorm", hidden), spec.norm_eps)
        q_CHTA, k_CHTA, v_CHTA = (
            F.linear(x_CTD, weight(f"self_attn.{name}_proj", rows, hidden))
            .view(*ids_CT.shape, -1, spec.head_dim)
            .transpose(1, 2)
            for name, rows in (("q", q), ("k", kv), ("v", kv))
        )
        attended_CHTA = F.scaled_dot_product_attention(
            _rotate(q_CHTA, cos_TA, sin_TA), _rotate(k_CHTA, cos_TA, sin_TA), v_CHTA, is_causal=True, enable_gqa=True
        )
        h_CTD = h_CTD + F.linear(attended_CHTA.transpose(1, 2).flatten(-2), weight("self_attn.o_proj", hidden, q))
        x_CTD = F.rms_norm(h_CTD, (hidden,), weight("post_attention_layernorm", hidden), spec.norm_eps)
        yield x_CTD[:, 1:].flatten(0, 1)
        gate_CTF = F.linear(x_CTD, weight("mlp.gate_proj", spec.ffn_size, hidden))
        up_CTF = F.linear(x_CTD, weight("mlp.up_proj", spec.ffn_size, hidden))
        h_CTD = h_CTD + F.linear(F.silu(gate_CTF) * up_CTF, weight("mlp.down_proj", hidden, spec.ffn_size))


def _encode_corpus(spec: ModelSpec, source: DenseSource) -> Tensor:
    """Equal chunks of every kind of text."""
    chunk = min(_CHUNK, spec.max_context, spec.sliding_window or _CHUNK)
    chunks = []
    for text in corpus.read_all():
        ids = source.tokenizer.encode(text, add_special_tokens=False).ids[:_TOKENS_PER_KIND]
        chunks += [ids[start : start + chunk] for start in range(0, len(ids) - chunk + 1, chunk)]
    ids_CT = torch.tensor(chunks)
    if ids_CT.max() >= spec.vocab_size:
        raise CheckpointError(
            f"{source.origin}: the tokenizer gives id {int(ids_CT.max())}, the model knows {spec.vocab_size} tokens"
        )
    if ids_CT.shape[0] * (chunk - 1) < spec.n_experts:
        raise CheckpointError(
            f"{source.origin}: {spec.n_experts} experts are more than the text to fit gates to has tokens"
        )
    return ids_CT


def _rotate(x_CHTA: Tensor, cos_TA: Tensor, sin_TA: Tensor) -> Tensor:
    left, right = x_CHTA.chunk(2, dim=-1)
    return x_CHTA * cos_TA + torch.cat([-right, left], dim=-1) * sin_TA


def _gate(x_ND: Tensor, n_experts: int, generator: torch.Generator) -> Tensor:
    unit_ND = F.normalize(x_ND, dim=-1)
    shared_D = F.normalize(unit_ND.mean(0), dim=0)
    rest_ND = F.normalize(unit_ND - torch.outer(unit_ND @ shared_D, shared_D), dim=-1)
    centroids_ED = spherical_kmeans(rest_ND, n_experts, generator)
    return centroids_ED * _scale(x_ND @ centroids_ED.T)


def spherical_kmeans(x_ND: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """`k` unit centroids [k, D] of the unit rows of `x_ND` (N >= k), by cosine; k-means++ start."""
    picked = [int(torch.randint(len(x_ND), (1,), generator=generator))]
    distance_N = 1 - x_ND @ x_ND[picked[0]]
    for _ in range(1, k):
        odds_N = distance_N.clamp_min(1e-9)
        odds_N[picked] = 0
        picked.append(int(torch.multinomial(odds_N, 1, generator=generator)))
        distance_N = torch.minimum(distance_N, 1 - x_ND @ x_ND[picked[-1]])
    centroids_KD = x_ND[picked]
    for _ in range(_ITERATIONS):
        nearest_N = (x_ND @ centroids_KD.T).argmax(-1)
        sums_KD = torch.zeros_like(centroids_KD).index_add_(0, nearest_N, x_ND)
        filled_K = torch.bincount(nearest_N, minlength=k) > 0  # an empty one stays where it is
        centroids_KD = torch.where(filled_K[:, None], F.normalize(sums_KD, dim=-1), centroids_KD)
    return centroids_KD


def _scale(logits_NE: Tensor) -> float:
    """The factor that makes the better of a token's two best experts weigh `_FIRST_SHARE` on average."""
    if logits_NE.shape[1] < 2:
        return 1.0
    best_N2 = logits_NE.topk(2, dim=-1).values
    lead_N = best_N2[:, 0] - best_N2[:, 1]
    low, high = -20.0, 20.0  # of the logarithm
    for _ in range(40):
        middle = (low + high) / 2
        if float(torch.sigmoid(lead_N * 2.0**middle).mean()) < _FIRST_SHARE:
            low = middle
        else:
            high = middle
    return float(2.0**low)
