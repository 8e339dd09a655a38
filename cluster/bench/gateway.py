"""A running gateway as the benchmarks meet it: the options that name it, its model, its streams."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from cluster.bench.sse_client import post_events
from cluster.errors import ExpertMeshError

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option(help="where the gateway listens")]
Key = Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="API key, if the gateway asks for one")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]

_CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class Client:
    """One model behind the gateway at `url`."""

    url: str
    key: str | None
    model: str

    def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed request. Raises like `sse_client.post_events`."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = {"model": self.model, "stream": True, **body}
        return post_events(self.url.rstrip("/") + path, headers, json.dumps(request).encode())


async def connect(url: str, key: str | None) -> Client:
    """Ask the gateway for its model. Raises ExpertMeshError when nothing answers there."""
    import httpx  # `--help` needs it not

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        # Past any proxy, as the streams go too: it would be measured with the gateway.
        tls = ssl.create_default_context()
        async with httpx.AsyncClient(
            base_url=url, headers=headers, timeout=_CONNECT_S, trust_env=False, verify=tls
        ) as client:
            models = (await client.get("/v1/models")).raise_for_status().json()
    except httpx.HTTPError as error:
        raise ExpertMeshError(f"no gateway answers at {url}: {error}") from error
    return Client(url, key, models["data"][0]["id"])
