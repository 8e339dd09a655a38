"""Would catch: a tenant that gets more than its limits, is refused below them, or never again after it once was."""

from __future__ import annotations

import contextlib
from pathlib import Path

import httpx
import pytest

from cluster.errors import RequestError
from cluster.gateway.tenants import Tenant, TenantLimits
from tests.unit.cluster.gateway.fake_gateway import Served, serve


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def taken(tenant: Tenant, n: int = 1, tokens: int = 0) -> bool:
    """Whether a request that ends at once is taken."""
    try:
        with tenant.admitted(n):
            tenant.spend(tokens)
    except RequestError as error:
        assert (error.status, error.code) == (429, "rate_limit_exceeded") and (error.retry_after_s or 0) >= 1
        return False
    return True


def test_sequences_at_once() -> None:
    tenant = Tenant("a", TenantLimits(max_open=4))
    with tenant.admitted(3):
        assert taken(tenant) and not taken(tenant, 2)
    assert taken(tenant, 4) and not taken(tenant, 5)
    with pytest.raises(ZeroDivisionError), tenant.admitted(4):
        raise ZeroDivisionError
    assert taken(tenant, 4)


def test_requests_a_minute_come_back_with_time() -> None:
    clock = Clock()
    tenant = Tenant("a", TenantLimits(requests_per_minute=60), clock=clock)
    assert [taken(tenant) for _ in range(62)] == [True] * 60 + [False] * 2
    clock.now += 1
    assert [taken(tenant) for _ in range(2)] == [True, False], "one that was refused costs nothing"
    clock.now += 3600
    assert sum(taken(tenant) for _ in range(100)) == 60, "what was not used for an hour is not saved up"


def test_tokens_are_paid_for_afterwards() -> None:
    clock = Clock()
    tenant = Tenant("a", TenantLimits(tokens_per_minute=600), clock=clock)
    assert taken(tenant, tokens=1200)
    with pytest.raises(RequestError) as caught, tenant.admitted(1):
        pass
    assert 60 <= (caught.value.retry_after_s or 0) <= 61
    clock.now += caught.value.retry_after_s or 0
    assert taken(tenant)


def test_gateways_share_a_limit() -> None:
    clock = Clock()
    two = [Tenant("a", TenantLimits(3, 60, 600), lambda: 2, clock) for _ in range(2)]
    with contextlib.ExitStack() as stack:
        for tenant in two:
            stack.enter_context(tenant.admitted(2))
            assert not taken(tenant)
    assert sum(taken(tenant) for _ in range(100) for tenant in two) == 58


@pytest.fixture(scope="module")
def limited(byte_level_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("small name=small max_open=2 tokens_per_minute=100000\nfree\n")
    with serve(byte_level_path, api_keys_file=file) as served:
        yield served


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_every_endpoint_keeps_to_the_limits_of_its_key(limited: Served, path: str, stream: bool) -> None:
    text = {"prompt": "Hi"} if path == "/v1/completions" else {"input": "Hi"}
    text = text if path in ("/v1/completions", "/v1/responses") else {"messages": [{"role": "user", "content": "Hi"}]}
    limited.session.reset()

    def ask(key: str, **more: object) -> httpx.Response:
        body = {"model": "tiny", "max_tokens": 4, "stream": stream} | text | more
        return httpx.post(limited.url + path, json=body, headers={"Authorization": f"Bearer {key}"})

    assert ask("small").status_code == 200
    if path not in ("/v1/responses", "/v1/messages"):
        refused = ask("small", n=3)
        assert refused.status_code == 429 and refused.headers["Retry-After"] == "1", refused.text
        assert "2 sequences at once" in refused.json()["error"]["message"]
        assert ask("free", n=3).status_code == 200
        assert ask("small", n=2).status_code == 200, "those before have ended"
