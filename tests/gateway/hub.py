"""A stand-in for the model hub, which no test can reach: it takes what an upload sends, and keeps it in memory."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    uploaded: dict[str, bytes]

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            self._answer(200, {"name": "me", "type": "user"})
        else:
            self._answer(404, {"error": "there is nothing yet"})

    def do_HEAD(self) -> None:
        self._answer(404, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path == "/api/repos/create":
            self._answer(200, {"url": f"http://{self.headers['host']}/me/adapter"})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = "0" * 40
            url = f"http://{self.headers['host']}/me/adapter/commit/{commit}"
            self._answer(200, {"success": True, "commitOid": commit, "commitUrl": url})
        else:
            self._answer(404, {"error": self.path})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = b"" if self.command == "HEAD" else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Its address, and the files that have been uploaded to it, by name."""
    uploaded: dict[str, bytes] = {}
    handler = type("Handler", (_Handler,), {"uploaded": uploaded})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", uploaded
        finally:
            server.shutdown()
            thread.join()
