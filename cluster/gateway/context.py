"""What the routes share: the model they serve, its tokenizer, and the session that generates."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from cluster.config import Config
from cluster.errors import RequestError
from cluster.gateway.defaults import SamplingDefaults
from cluster.gateway.logprobs import TokenNames
from cluster.gateway.metrics import Metrics
from cluster.gateway.schemas.fields import Body
from cluster.gateway.schemas.known import INSTEAD, UNSUPPORTED
from cluster.gateway.template_process import TemplateProcess
from cluster.gateway.tokenizer import Tokenizer
from cluster.router.grammar import GrammarCompiler
from cluster.router.params import SamplingParams, StepOutput

log = logging.getLogger(__name__)


@lru_cache(maxsize=256)
def _log_unknown(name: str) -> None:
    log.info("requests have the field %r, which this server does not know; it is ignored", name)


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

    @property
    def n_open(self) -> int:
        """Sequences that have not ended."""
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
    grammars: GrammarCompiler
    templates: TemplateProcess  # of requests
    fingerprint: str  # of model and server version: other answers may come where it differs

    def check_unknown(self, body: Body) -> None:
        """Raise RequestError for a field that changes the answer elsewhere and cannot here; with `strict_fields` for
        any that is not known. The others are ignored, and named in the log once."""
        for name in body.unknown():
            if name in UNSUPPORTED:
                message = f"'{name}' is not supported" + (f": {INSTEAD[name]}" if name in INSTEAD else "")
                raise RequestError(message, code="unsupported_parameter", param=name)
            if self.config.strict_fields:
                message = f"'{name[:200]}' is not a known parameter"
                raise RequestError(message, code="unknown_parameter", param=name[:200])
            _log_unknown(name[:64])

    def check_model(self, name: str | None) -> None:
        """Raise RequestError (404) where `name` is not the model that is served."""
        if name is not None and name != self.model.id:
            raise RequestError(
                f"The model `{name[:200]}` does not exist; this server has `{self.model.id}`",
                code="model_not_found",
                param="model",
                status=404,
            )
