"""Which experts computed the rows of a step, layer by layer, for whoever wants to show it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

NO_EXPERT = -1  # in a layer without experts


def stacked(ids_by_layer: Mapping[int, Tensor], n_layers: int) -> Tensor:
    """int16 [R, L, K], on the device of the ids: the experts of each row, as the gate ordered them, first choice first.

    ids_by_layer: [R, K] of each layer that has experts, of any integer type; at least one. `NO_EXPERT` in the others.
    """
    first = next(iter(ids_by_layer.values()))
    ids_RLK = torch.full((len(first), n_layers, first.shape[1]), NO_EXPERT, dtype=torch.int16, device=first.device)
    layers = sorted(ids_by_layer)
    ids_RLK[:, layers] = torch.stack([ids_by_layer[layer] for layer in layers], 1).to(torch.int16)
    return ids_RLK
