"""Would catch: a key that opens nothing or everything, a key in an error, a gateway open to the world by accident."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.errors import ConfigError
from cluster.gateway.keys import ApiKeys, check_exposure
from cluster.gateway.tenants import TenantLimits


def test_plain_and_hashed_keys_are_accepted_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# team a\nsecret-1\n\n  sha256:{sha256(b'secret-2').hexdigest().upper()}  \n")
    keys = ApiKeys.from_file(file)
    for header in ("Bearer secret-1", "bearer secret-2", "Bearer  secret-2"):
        assert keys.tenant_of(header) is not None
    for header in (None, "", "Bearer", "Bearer ", "secret-1", "Basic secret-1", "Bearer secret", "Bearer # team a",
                   f"Bearer sha256:{sha256(b'secret-2').hexdigest()}", "Bearer \udcff"):  # fmt: skip
        assert keys.tenant_of(header) is None
    assert "secret" not in repr(vars(keys))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only a comment\n",
        "two words\n",
        "sha256:abc\n",
        "sch\u00fcssel\n",
        "key max_open=0\n",
        "key max_open=x\n",
        "key max_open=1 max_open=2\n",
        "key max=1\n",
        "key name=\n",
        "key name=a/b\n",
        "key =1\n",
        "key open=3\n",
        "key tokens_per_minute=-1\n",
        "key requests_per_minute=99999999999999999999\n",
    ],
)
def test_a_file_without_proper_keys_is_an_error_that_shows_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        ApiKeys.from_file(file)
    assert str(file) in str(caught.value)
    assert not text.strip() or text.strip() not in str(caught.value)


def test_keys_of_one_name_are_one_tenant_with_one_set_of_limits(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old name=search max_open=4 tokens_per_minute=1000\nnew name=search\nother requests_per_minute=7\n")
    keys = ApiKeys.from_file(file)
    old, new, other = (keys.tenant_of(f"Bearer {key}") for key in ("old", "new", "other"))
    assert old is not None and old is new and other is not None and other.name != old.name
    assert old.limits == TenantLimits(max_open=4, tokens_per_minute=1000)
    assert other.limits == TenantLimits(requests_per_minute=7)
    file.write_text("old name=search max_open=4\nnew name=search max_open=5\n")
    with pytest.raises(ConfigError, match=":2: another line gives 'search' other limits"):
        ApiKeys.from_file(file)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="api_keys_file"):
        ApiKeys.from_file(tmp_path / "none")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_key(host: str) -> None:
    check_exposure(Config(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.org", "localhost.example.org"])
def test_beyond_loopback_keys_or_a_flag_are_needed(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allow_no_keys"):
        check_exposure(Config(host=host))
    check_exposure(Config(host=host, allow_no_keys=True))
    check_exposure(Config(host=host, api_keys_file=tmp_path / "keys"))
