"""The sampling defaults of a checkpoint: what its generation_config.json says of fields that a request leaves out.

As vLLM reads that file: these six fields, each for itself, whatever `do_sample` says.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, RequestError
from cluster.gateway.tokenizer import read_json
from cluster.router import limits
from cluster.router.params import SamplingParams

FILE = "generation_config.json"
_WHOLE = ("top_k", "max_new_tokens")


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """None where the checkpoint says nothing: then the endpoint's own default is in force."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None  # the limit of a chat's answer that is given none

    def named(self) -> dict[str, Any]:
        """Those that the checkpoint names."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.named().items())


def read_defaults(checkpoint: Path) -> SamplingDefaults:
    """What `checkpoint` says. Raises CheckpointError naming file and field where no request could ask for the same."""
    file = checkpoint / FILE
    content = read_json(file)
    try:
        values = {
            name: _number(name, content[name])
            for name in SamplingDefaults.__dataclass_fields__
            if content.get(name) is not None
        }
        sampling = {name: value for name, value in values.items() if name != "max_new_tokens"}
        limits.check([0], SamplingParams(max_tokens=1, **sampling), vocab_size=1, max_context=2)
    except (ValueError, RequestError) as error:
        raise CheckpointError(f"{file}: {error}; correct it, or turn `generation_defaults` off") from error
    return SamplingDefaults(**values)


def _number(name: str, value: Any) -> Any:
    whole = name in _WHOLE
    if isinstance(value, bool) or not isinstance(value, int | float) or (whole and value % 1 != 0):
        raise ValueError(f"'{name}' must be {'a whole number' if whole else 'a number'}, not {value!r}")
    if name == "max_new_tokens" and value < 1:
        raise ValueError(f"'{name}' must be at least 1, not {value}")
    if name == "top_k" and value == -1:  # as in a request: off
        return 0
    return int(value) if whole else float(value)
