"""Where a plan takes a model's sizes from: a `config.json`, wherever it is."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.errors import CheckpointError
from workers.families.config import read_json
from workers.families.registry import spec_of
from workers.spec import ModelSpec

_MIXTRAL = {"model_type": "mixtral", "hidden_act": "silu", "num_local_experts": 8, "num_experts_per_tok": 2,
            "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8}  # fmt: skip

# What can be planned without a download, by the hub's name in small letters and without its owner.
KNOWN = {
    "mixtral-8x7b": {**_MIXTRAL, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 32768},
    "mixtral-8x22b": {**_MIXTRAL, "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56,
                      "num_attention_heads": 48, "vocab_size": 32768, "max_position_embeddings": 65536},
}  # fmt: skip

# What such a name alone stands for on the hub.
HUB_IDS = {
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-Instruct-v0.1",
}


def spec_of_model(model: str) -> ModelSpec:
    """The sizes of `model`: a checkpoint directory, a `config.json`, a name in `KNOWN`, or a hub id.

    Of the hub only `config.json` is fetched. Raises CheckpointError.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return spec_of(read_json(path), path)
    name = model.rpartition("/")[2].lower()
    for known, values in KNOWN.items():
        if name.startswith(known):
            return spec_of(dict(values), Path(known))
    return _from_hub(model)


def _from_hub(model: str) -> ModelSpec:
    from huggingface_hub import hf_hub_download  # slow to import

    try:
        path = Path(hf_hub_download(model, "config.json"))
        return spec_of(json.loads(path.read_text(encoding="utf-8")), path)
    except CheckpointError:
        raise
    except Exception as error:  # network, permission, name: a dozen classes, all of which mean this
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"--model {model}: no directory or config.json, none of {', '.join(KNOWN)}, and the hub says: {reason}"
        ) from error
