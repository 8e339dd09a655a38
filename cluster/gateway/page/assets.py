"""The live page's files: plain modules without a build step, read once; a policy lets nothing else in."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from importlib.resources import files

from starlette.responses import Response

_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
INDEX = "index.html"

#: Scripts and styles are files of this gateway, requests go to it alone, and no other page shows this one in a frame.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked again each time, answered with 304 while it is the same
}


@cache
def names() -> frozenset[str]:
    """Every file of the page."""
    return frozenset(entry.name for entry in files(__package__).joinpath("static").iterdir())


@cache
def _read(name: str) -> tuple[bytes, str]:
    """A file and its entity tag."""
    content = files(__package__).joinpath("static", name).read_bytes()
    return content, f'"{sha256(content).hexdigest()[:20]}"'


def answer(name: str, known_tag: str | None) -> Response:
    """The file `name`, which is one of `names`; 304 where the browser has it."""
    content, tag = _read(name)
    headers = {**HEADERS, "ETag": tag}
    if known_tag == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=_TYPES[name.rpartition(".")[2]], headers=headers)
