"""How a model's gate turns scores into experts and weights, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class GateSpec:
    """The rule of a gate. Of equal scores the lower expert comes first.

    The scores of a token are a softmax over all experts or a sigmoid of each; the `top_k` best are chosen (by score
    plus a correction bias where the model has one: DeepSeek-V3, section 2.1.2). Their weights are their scores, which
    with `normalize` are divided by their sum. A softmax that is normalised so is the softmax over the chosen alone,
    which is how Mixtral and Granite state it.
    """

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0  # of the weights, after all that
