"""The gateway's HTTP application. Whoever runs it (uvicorn, Ray Serve, a test) brings the session."""

from __future__ import annotations

from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware

from cluster.config import Config
from cluster.gateway import http_errors, response_bodies
from cluster.gateway.context import Gateway, ModelCard, Session
from cluster.gateway.front import Front
from cluster.gateway.hosts import Hosts
from cluster.gateway.keys import ApiKeys, check_exposure
from cluster.gateway.logprobs import TokenNames
from cluster.gateway.messages.routes import message_routes
from cluster.gateway.metrics import Metrics
from cluster.gateway.openai_routes import openai_routes
from cluster.gateway.page.feed import Feed, Source
from cluster.gateway.page.routes import page_routes
from cluster.gateway.responses.routes import response_routes
from cluster.gateway.service_routes import service_routes
from cluster.gateway.template_process import TemplateProcess
from cluster.gateway.token_routes import token_routes
from cluster.gateway.tokenizer import Tokenizer
from cluster.router.grammar import GrammarCompiler


def create_app(
    config: Config,
    model: ModelCard,
    tokenizer: Tokenizer,
    session: Session,
    metrics: Metrics | None = None,
    source: Source | None = None,
) -> FastAPI:
    """The OpenAI-compatible API of one model. `metrics` says which gateway it is, where there are several. `source`: of
    what the live page shows; None: there is no page.

    Raises ConfigError where the keys cannot be read, or where none is asked for and `config.host` can be reached from
    other machines.
    """
    check_exposure(config)
    metrics = metrics or Metrics()
    keys = ApiKeys.from_file(config.api_keys_file, metrics.n_gateways) if config.api_keys_file is not None else None
    grammars = GrammarCompiler(model.path, model.vocab_size, tokenizer.eos_ids)
    names, fingerprint = TokenNames(tokenizer.pieces), _fingerprint(model)
    templates = TemplateProcess(tokenizer.special_tokens)
    gateway = Gateway(config, model, tokenizer, names, session, metrics, grammars, templates, fingerprint)
    app = FastAPI(
        title="ExpertMesh",
        description="A mixture-of-experts model behind OpenAI's API",
        version=_version(),
        redoc_url=None,
        root_path=config.root_path,
        responses=response_bodies.ERRORS,
    )
    http_errors.install(app)
    app.add_middleware(
        Front, keys=keys, hosts=Hosts(config), max_body_bytes=config.max_body_bytes, metrics=gateway.metrics
    )
    if config.cors_origins:
        origins = [origin.strip() for origin in config.cors_origins.split(",")]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    # `Front` checks the key; here it is only described.
    secured = [Depends(HTTPBearer(auto_error=False))] if keys is not None else []
    app.include_router(openai_routes(gateway), dependencies=secured)
    app.include_router(message_routes(gateway), dependencies=secured)
    app.include_router(response_routes(gateway), dependencies=secured)
    app.include_router(token_routes(gateway), dependencies=secured)
    app.include_router(service_routes(gateway, app.version))
    if source is not None and config.live_page:
        facts = {"model": model.id, "version": app.version, "gateway": gateway.metrics.gateway}
        app.include_router(page_routes(Feed(source, facts), source))
    return app


def _fingerprint(model: ModelCard) -> str:
    return "fp_" + sha256(f"{model.id} {model.created} {_version()}".encode()).hexdigest()[:12]


def _version() -> str:
    try:
        return version("expertmesh")
    except PackageNotFoundError:  # run from a source tree
        return "0"
