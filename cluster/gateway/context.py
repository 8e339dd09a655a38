"""What the routes share: the model they serve, its tokenizer, and the session that generates."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.config import Config
from cluster.errors import RequestError
from cluster.gateway.defaults import SamplingDefaults
from cluster.gateway.logprobs import TokenNames
from cluster.gateway.metrics import Metrics
from cluster.gateway.tokenizer import Tokenizer
from cluster.router.params import SamplingParams, StepOutput


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The model as the API names it."""

    id: str
    path: str  # checkpoint directory
    max_context: int  # tokens, prompt and answer together
    vocab_size: int
    created: int  # seconds since 1970
    defaults: SamplingDefaults  # of sampling fields that a request leaves out


class Session(Protocol):
    """What the gateway asks of `cluster.gateway.session.Session`."""

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[StepOutput, None]:
        """Run one sequence; closing the generator cancels it. RequestError where it is refused."""
        ...

    def ready(self) -> bool:
        """Whether a router is connected that has its model loaded and its workers connected."""
        ...


@dataclass(frozen=True, slots=True)
class Gateway:
    """One gateway; the routes close over it."""

    config: Config
    model: ModelCard
    tokenizer: Tokenizer
    names: TokenNames  # of the tokenizer's tokens
    session: Session
    metrics: Metrics

    def check_model(self, name: str | None) -> None:
        """Raise RequestError (404) where `name` is not the model that is served."""
        if name is not None and name != self.model.id:
            raise RequestError(
                f"The model `{name[:200]}` does not exist; this server has `{self.model.id}`",
                code="model_not_found",
                param="model",
                status=404,
            )
