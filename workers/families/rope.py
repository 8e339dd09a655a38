"""The rotary embedding of a `config.json`, as older and as newer versions of transformers write it.

Older: `rope_theta` and `rope_scaling` at the top. Newer: both in `rope_parameters`. Where `rope_scaling` is given it
wins, as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from workers.errors import CheckpointError
from workers.families.config import Config
from workers.spec import ModelSpec, RopeScaling

_SHARED_KEYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned"}


def read_rope(
    config: Config, *, theta: float, head_dim: int, context: int, partial: float | None = None
) -> dict[str, Any]:
    """The fields of ModelSpec that say how positions are embedded, and `max_context`.

    `theta` and `partial` (the share of each head that is rotated; None: the family rotates all) hold where the file is
    silent; `context` is its `max_position_embeddings`. Raises CheckpointError for a scaling, or a key of one, that is
    not known.
    """
    scaling, parameters = config.object("rope_scaling"), config.object("rope_parameters")
    rope = scaling if scaling.values else parameters
    kind = rope.find("rope_type", str) or rope.find("type", str) or "default"
    if kind != "default" and kind not in _READERS:
        supported = ", ".join(("default", *_READERS))
        raise CheckpointError(
            f"{config.path}: unsupported rotary scaling {kind!r} in `{rope.prefix[:-1]}`; supported: {supported}"
        )
    top_theta, top_partial = config.find("rope_theta", float), config.find("partial_rotary_factor", float)
    share = rope.get("partial_rotary_factor", float, (partial or 1.0) if top_partial is None else top_partial)
    original = config.find("original_max_position_embeddings", int)
    rotated = int(head_dim * share)
    if (partial is None and share != 1) or not 0 < share <= 1 or (share < 1 and (rotated % 2 or not rotated)):
        raise CheckpointError(f"{config.path}: unsupported `partial_rotary_factor` {share} of head_dim {head_dim}")
    fields: dict[str, Any] = {
        "rope_theta": rope.get("rope_theta", float, theta if top_theta is None else top_theta),
        "rotary_dim": rotated if rotated != head_dim else None,
        "max_context": context,
    }
    if kind != "default":
        read = _READERS[kind](rope, original or rope.find("original_max_position_embeddings", int) or context, context)
        fields["rope_scaling"] = read
        if kind in ("linear", "dynamic", "yarn"):  # of these the file states what the model was trained on
            trained = read.original_context if kind == "yarn" else context
            fields["max_context"] = max(context, int(trained * read.factor))
        if kind == "dynamic" and rotated <= 2:
            raise CheckpointError(f"{config.path}: dynamic rotary scaling needs more than one pair; {rotated} rotate")
    rope.skip(*_SHARED_KEYS)
    for key, value in rope.values.items():
        if key not in rope.read and value is not None:
            raise CheckpointError(f"{config.path}: unsupported `{rope.prefix}{key}` {value!r} with {kind!r} scaling")
    return fields


def write_rope(spec: ModelSpec) -> dict[str, Any]:
    """The keys of `config.json` that `read_rope` reads, in the newer form; the base also in the older."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rope_theta}
    scaling, context = spec.rope_scaling, spec.max_context
    if scaling is not None:
        parameters |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind in ("linear", "dynamic"):
            context = scaling.original_context
        else:
            parameters["original_max_position_embeddings"] = scaling.original_context
        if scaling.kind == "yarn":
            parameters |= {"attention_factor": scaling.attention_factor, "beta_fast": scaling.beta_fast,
                           "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}  # fmt: skip
        if scaling.kind == "llama3":
            parameters |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    values = {"max_position_embeddings": context, "rope_theta": spec.rope_theta, "rope_parameters": parameters}
    if spec.rotary_dim is not None:
        values["partial_rotary_factor"] = parameters["partial_rotary_factor"] = spec.rotary_dim / spec.head_dim
    return values


def _linear(rope: Config, original: int, context: int) -> RopeScaling:
    return RopeScaling("linear", _factor(rope), context)


def _dynamic(rope: Config, original: int, context: int) -> RopeScaling:
    return RopeScaling("dynamic", _factor(rope), context)


def _yarn(rope: Config, original: int, context: int) -> RopeScaling:
    factor = _factor(rope) if rope.has("factor") else context / original
    mscale, mscale_all = rope.find("mscale", float), rope.find("mscale_all_dim", float)
    usual = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all) if mscale and mscale_all else None
    return RopeScaling(
        "yarn",
        factor,
        original,
        attention_factor=rope.get("attention_factor", float, _yarn_scale(factor) if usual is None else usual),
        beta_fast=rope.find("beta_fast", float) or 32.0,
        beta_slow=rope.find("beta_slow", float) or 1.0,
        truncate=rope.get("truncate", bool, True),
    )


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """The temperature that the YaRN paper recommends (section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(rope: Config, original: int, context: int) -> RopeScaling:
    low, high = rope.get("low_freq_factor", float), rope.get("high_freq_factor", float)
    if not 0 < low < high:
        raise CheckpointError(f"{rope.path}: `{rope.prefix}high_freq_factor` {high} is not above low_freq_factor {low}")
    return RopeScaling("llama3", _factor(rope), original, low_freq_factor=low, high_freq_factor=high)


def _factor(rope: Config) -> float:
    factor = rope.get("factor", float)
    if factor < 1:
        raise CheckpointError(f"{rope.path}: `{rope.prefix}factor` is {factor}, less than 1")
    return factor


_READERS: dict[str, Callable[[Config, int, int], RopeScaling]] = {
    "linear": _linear, "dynamic": _dynamic, "yarn": _yarn, "llama3": _llama3,
}  # fmt: skip
