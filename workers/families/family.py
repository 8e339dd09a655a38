"""What makes a family: a file each, and one entry in the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workers.families.config import Config
from workers.families.tensors import Layout
from workers.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type` of Hugging Face's `config.json`.

    `read` gives the fields of ModelSpec that not all families read alike, and `allow`s or `skip`s every other key that
    the family knows: whatever it does not mention is refused if it could change a result. `write` is its inverse.
    """

    model_type: str
    architecture: str  # the class of transformers
    layouts: tuple[Layout, ...]  # how its tensors may be named; the first is how they are written
    read: Callable[[Config, int], dict[str, Any]]  # of the configuration and the number of layers
    write: Callable[[ModelSpec], dict[str, Any]]
    typical: Callable[[ModelSpec], dict[str, Any]]  # fields in which its models differ from a Mixtral of these sizes
    rope_theta: float = 1e4  # these where the file is silent
    norm_eps: float = 1e-6
    max_context: int | None = None  # None: it has to say
    rotary_share: float | None = None  # of each head; None: always all of it
