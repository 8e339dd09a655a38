"""Every family that is served, and the way from `config.json` to a ModelSpec and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from workers.errors import CheckpointError
from workers.families.config import Config, read_json
from workers.families.family import Family
from workers.families.glm4_moe import GLM4_MOE
from workers.families.granite_moe import GRANITE_MOE
from workers.families.llama import LLAMA
from workers.families.mistral import MISTRAL
from workers.families.mixtral import MIXTRAL
from workers.families.olmoe import OLMOE
from workers.families.qwen2_moe import QWEN2_MOE
from workers.families.qwen3_moe import QWEN3_MOE
from workers.families.rope import read_rope, write_rope
from workers.families.tensors import Layout, TensorNames
from workers.spec import ModelSpec
from workers.weights import IN_FILES

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (MIXTRAL, QWEN3_MOE, QWEN2_MOE, OLMOE, GRANITE_MOE, GLM4_MOE, LLAMA, MISTRAL)
}  # fmt: skip


def read_spec(directory: str | Path) -> ModelSpec:
    """Read `config.json` (and `generation_config.json`, where it exists) of a checkpoint directory.

    Raises CheckpointError when a file is missing or broken, a size is missing or cannot be right, or the model is not
    one that is computed exactly here.
    """
    directory = Path(directory)
    spec = spec_of(read_json(directory / "config.json"), directory / "config.json")
    path = directory / "generation_config.json"
    eos_ids = Config(path, read_json(path)).token_ids("eos_token_id") if path.is_file() else ()
    return replace(spec, eos_ids=eos_ids) if eos_ids else spec


def spec_of(values: Mapping[str, Any], origin: Path) -> ModelSpec:
    """The spec that the values of a `config.json` state; errors name `origin`. Raises CheckpointError."""
    config = Config(origin, values)
    family = _family(config)
    config.allow("hidden_act", "silu", "swish")
    n_heads, hidden_size = config.get("num_attention_heads", int), config.get("hidden_size", int)
    n_layers, head_dim = config.get("num_hidden_layers", int), config.find("head_dim", int)
    head_dim = hidden_size // max(n_heads, 1) if head_dim is None else head_dim
    context = config.get("max_position_embeddings", int, family.max_context)
    spec = ModelSpec(
        family=family.model_type,
        hidden_size=hidden_size,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=config.get("num_key_value_heads", int, n_heads),
        head_dim=head_dim,
        vocab_size=config.get("vocab_size", int),
        norm_eps=config.get("rms_norm_eps", float, family.norm_eps),
        tie_embeddings=config.get("tie_word_embeddings", bool, False),
        bos_id=next(iter(config.token_ids("bos_token_id")), None),
        eos_ids=config.token_ids("eos_token_id"),
        dtype=_dtype(config),
        **read_rope(config, theta=family.rope_theta, head_dim=head_dim, context=context, partial=family.rotary_share),
        **family.read(config, n_layers),
    )
    config.refuse_unread()
    _check_sizes(spec, origin)
    return spec


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """The `config.json` of a model of `spec`: what `spec_of` reads back, in its family's own words."""
    family = FAMILIES[spec.family]
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "bos_token_id": spec.bos_id,
        "eos_token_id": list(spec.eos_ids) or None,
        "torch_dtype": str(spec.dtype).removeprefix("torch."),
        **write_rope(spec),
        **family.write(spec),
    }


def tensor_names(spec: ModelSpec, *, fused: bool = False) -> TensorNames:
    """How the tensors of a new checkpoint are named, with all experts of a layer in one tensor if `fused`."""
    layouts = FAMILIES[spec.family].layouts
    return TensorNames(spec, next((layout for layout in layouts if fused and layout.fused), layouts[0]))


def layout_in(spec: ModelSpec, holds: Callable[[str], bool]) -> Layout:
    """The layout of a checkpoint that `holds` some tensor names, by its experts'; the usual one where none fits."""
    layouts = FAMILIES[spec.family].layouts
    for layout in layouts if spec.sparse_layers else ():
        tensors, layer = TensorNames(spec, layout), spec.sparse_layers[0]
        first = tensors.fused_experts(layer) or tensors.expert(layer, 0)
        if any(holds(name) for name, _ in first.values()):
            return layout
    return layouts[0]


def _family(config: Config) -> Family:
    kind = config.values.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise CheckpointError(f"{config.path}: unsupported architecture {kind!r}; supported: {', '.join(FAMILIES)}")
    if config.values.get("quantization_config"):
        raise CheckpointError(f"{config.path}: quantized checkpoints (`quantization_config`) are not supported")
    return family


def _dtype(config: Config) -> Any:
    name = config.find("dtype", str) or config.find("torch_dtype", str) or "float32"
    config.skip("torch_dtype")
    dtypes = {each.name: each.dtype for each in IN_FILES.values()}
    if name not in dtypes:
        raise CheckpointError(f"{config.path}: unsupported dtype {name!r}; supported: {', '.join(dtypes)}")
    return dtypes[name]


def _check_sizes(spec: ModelSpec, origin: Path) -> None:
    """Sizes that contradict themselves fail here, not as a shape error in the middle of a step."""
    positive = ["hidden_size", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "max_context",
                "rope_theta", "norm_eps", "scale", "embed_scale", "residual_scale", "logits_scaling"]  # fmt: skip
    positive += ["ffn_size", "n_experts", "top_k"] if spec.sparse_layers else []
    positive += ["dense_ffn_size"] if spec.dense_layers else []
    for name in positive:
        if not getattr(spec, name) > 0:
            raise CheckpointError(f"{origin}: {name} is {getattr(spec, name)}, not positive")
    if spec.sliding_window is not None and spec.sliding_window < 1:
        raise CheckpointError(f"{origin}: sliding_window is {spec.sliding_window}, not positive")
    if spec.shared_ffn_size < 0:
        raise CheckpointError(f"{origin}: shared_ffn_size is {spec.shared_ffn_size}, negative")
    if spec.n_heads % spec.n_kv_heads:
        raise CheckpointError(
            f"{origin}: {spec.n_heads} attention heads cannot share {spec.n_kv_heads} key/value heads evenly"
        )
    if spec.head_dim % 2:
        raise CheckpointError(f"{origin}: head_dim {spec.head_dim} is odd; rotary embedding needs pairs")
    if spec.sparse_layers and spec.top_k > spec.n_experts:
        raise CheckpointError(f"{origin}: top-{spec.top_k} of {spec.n_experts} experts is impossible")
