"""Angles of the rotary position embedding; the rotation itself is a kernel.

Shape legend: T token rows, r numbers of a head that are rotated, p = r / 2 pairs of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.spec import ModelSpec, RopeScaling


class Rope:
    """Computes the angles of a step's positions, once for all layers: a table of all positions would take 128 MB."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        scaling = spec.rope_scaling
        self._theta, self._scaling = spec.rope_theta, scaling
        self._exponents_p = torch.arange(0, spec.rotary_size, 2, dtype=torch.float32, device=device) / spec.rotary_size
        self._frequencies_p = 1.0 / self._theta**self._exponents_p
        self._factor = 1.0
        if scaling is not None and scaling.kind != "dynamic":
            self._frequencies_p = _SCALED[scaling.kind](self._frequencies_p, self._theta, scaling)
            self._factor = scaling.attention_factor

    def angles(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [T, r], ready to use: the second half repeats the first."""
        positions_T1 = positions_T.to(torch.float32)[:, None]
        frequencies_p = self._frequencies_p
        if self._scaling is not None and self._scaling.kind == "dynamic":
            frequencies_p = self._dynamic(positions_T1, self._scaling)
        angles_Tr = (positions_T1 * frequencies_p).repeat(1, 2)
        cos_Tr, sin_Tr = angles_Tr.cos(), angles_Tr.sin()
        return (cos_Tr, sin_Tr) if self._factor == 1.0 else (cos_Tr * self._factor, sin_Tr * self._factor)

    def _dynamic(self, positions_T1: Tensor, scaling: RopeScaling) -> Tensor:
        """[T, p]: the base of a token is that of a context which ends with it.

        So what a token gives does not depend on the prompt's being computed at once or in pieces.
        """
        size = 2 * len(self._exponents_p)
        length_T1 = (positions_T1 + 1).clamp_min(scaling.original_context)
        stretch_T1 = scaling.factor * length_T1 / scaling.original_context - (scaling.factor - 1)
        return 1.0 / (self._theta * stretch_T1 ** (size / (size - 2))) ** self._exponents_p


def _linear(frequencies_p: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    return frequencies_p / scaling.factor


def _yarn(frequencies_p: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Fast pairs stay, slow ones are interpolated, those between are mixed (YaRN, equations 16 to 23)."""
    n_pairs = len(frequencies_p)

    def pair(turns: float) -> float:
        """The pair, as a fraction, that turns this often in the original context."""
        return n_pairs * math.log(scaling.original_context / (turns * 2 * math.pi)) / math.log(theta)

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * n_pairs - 1)
    pairs_p = torch.arange(n_pairs, dtype=torch.float32, device=frequencies_p.device)
    slow_p = ((pairs_p - low) / (high - low or 0.001)).clamp(0, 1)
    return frequencies_p / scaling.factor * slow_p + frequencies_p * (1 - slow_p)


def _llama3(frequencies_p: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Long waves are stretched, short ones are not, those between are mixed."""
    turns_p = scaling.original_context * frequencies_p / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    short_p = ((turns_p - low) / (high - low)).clamp(0, 1)
    return frequencies_p / scaling.factor * (1 - short_p) + frequencies_p * short_p


_SCALED = {"linear": _linear, "yarn": _yarn, "llama3": _llama3}
