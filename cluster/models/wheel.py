"""A wheel from a package index, without pip: environments made by uv have none."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx

PYPI = "https://pypi.org/simple"
# As uv and pip name the index to use instead of PyPI; uv's newest name first.
_INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_TIMEOUT = httpx.Timeout(20.0, read=60.0)


class WheelNotFound(Exception):
    """The index has no such file, or does not answer; the message says which and where, without credentials."""


class _Page(HTMLParser):
    """The links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if tag == "a" and name == "href" and value]


def index_url(environ: Mapping[str, str]) -> str:
    """The package index that pip and uv would use."""
    named = (environ.get(name) for name in _INDEX_VARIABLES)
    return next((url for url in named if url), PYPI)


def fetch_wheel(project: str, file: str, dest: Path, progress: Callable[[float], None]) -> Path:
    """Download `file` of `project` into the directory `dest` through the index's simple API (PEP 503, 691).

    Proxies, credentials in the URL or in ~/.netrc, and SSL_CERT_FILE count as with every httpx client. `progress`
    is told the fraction that is there. Raises WheelNotFound.
    """
    index = index_url(os.environ)
    where = urlsplit(index).hostname or index
    page = f"{index.rstrip('/')}/{project}/"
    try:
        with httpx.Client(follow_redirects=True, timeout=_TIMEOUT) as client:
            answer = client.get(page, headers={"Accept": _ACCEPT}).raise_for_status()
            link = next((link for link in _links(answer) if urlsplit(link).path.endswith(f"/{file}")), None)
            if link is None:
                raise WheelNotFound(f"{where} has no {file}")
            return _download(client, urljoin(str(answer.url), link), dest / file, progress)
    except httpx.HTTPStatusError as error:
        raise WheelNotFound(f"{where} answers {error.response.status_code}") from error
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
        raise WheelNotFound(f"{where}: {str(error) or type(error).__name__}") from error


def _links(answer: httpx.Response) -> list[str]:
    """The files of a project's page, which is JSON or HTML as the index likes."""
    if "json" in answer.headers.get("content-type", ""):
        return [str(file["url"]) for file in answer.json()["files"]]
    page = _Page()
    page.feed(answer.text)
    return page.links


def _download(client: httpx.Client, url: str, dest: Path, progress: Callable[[float], None]) -> Path:
    with client.stream("GET", url) as answer, dest.open("wb") as out:
        answer.raise_for_status()
        size, done = int(answer.headers.get("content-length", 0)), 0
        for chunk in answer.iter_bytes(1 << 20):
            out.write(chunk)
            done += len(chunk)
            progress(done / size if size else 0.0)
    if size and done != size:
        raise WheelNotFound(f"{urlsplit(url).hostname}: {dest.name} broke off after {done} of {size} bytes")
    return dest
