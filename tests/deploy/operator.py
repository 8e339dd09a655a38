"""KubeRay and the API server, as far as the pods of a release see them: what Ray's autoscaler asks and changes."""

from __future__ import annotations

import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.certificates import Authority
from tests.deploy.network import Host
from tests.deploy.rendering import Object

TOKEN = "of-a-service-account"


class ApiServer(ThreadingHTTPServer):
    """Holds one RayCluster, whose replicas Ray's autoscaler patches, and says which pods there are."""

    daemon_threads = True

    def __init__(self, name: str, spec: Object) -> None:
        super().__init__(("0.0.0.0", 443), _Handler)
        metadata = {"name": name, "namespace": "default", "resourceVersion": "1"}
        self.cluster: Object = {"metadata": metadata, "spec": spec}
        self.pods: list[Object] = []
        self.unknown: list[str] = []  # what was asked for and is not known here

    def group(self, name: str) -> Object:
        return next(group for group in self.cluster["spec"]["workerGroupSpecs"] if group["groupName"] == name)

    def answer(self, method: str, path: str, body: list[Object]) -> Object | None:
        path, _, query = path.partition("?")
        name, namespace = self.cluster["metadata"]["name"], self.cluster["metadata"]["namespace"]
        if path == f"/apis/ray.io/v1/namespaces/{namespace}/rayclusters/{name}":
            for change in body if method == "PATCH" else []:
                self._replace(change)
            return self.cluster
        if path == f"/api/v1/namespaces/{namespace}/pods" and f"ray.io/cluster%3D{name}" in query:
            return {"metadata": {"resourceVersion": "1"}, "items": self.pods}
        if found := re.fullmatch(rf"/api/v1/namespaces/{namespace}/pods/(.+)", path):
            return next((pod for pod in self.pods if pod["metadata"]["name"] == found[1]), None)
        return None

    def _replace(self, change: Object) -> None:
        found = re.fullmatch(r"/spec/workerGroupSpecs/(\d+)/(replicas|scaleStrategy)", change["path"])
        assert change["op"] == "replace" and found, change
        self.cluster["spec"]["workerGroupSpecs"][int(found[1])][found[2]] = change["value"]


class _Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def do_GET(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "[]")
        allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
        content = self.server.answer(self.command, self.path, body) if allowed else None
        if content is None:
            self.server.unknown.append(f"{self.command} {self.path}")
        self.send_response(200 if content is not None else 404 if allowed else 401)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    do_PATCH = do_GET

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def api_server(host: Host, spec: Object, account: Path) -> Iterator[ApiServer]:
    """One that listens at `host`; `account` becomes what a service account's volume holds."""
    files = Authority().write(account / "tls", "kubernetes.default")
    (account / "ca.crt").write_bytes(files.ca.read_bytes())
    (account / "token").write_text(TOKEN)
    server = host.call(ApiServer, "raycluster", spec)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files.cert, files.key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
