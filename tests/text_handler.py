"""What stands in for an HTTP server that answers with short texts, and says nothing of it."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler


class TextHandler(BaseHTTPRequestHandler):
    """Its methods call `answer`."""

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass
