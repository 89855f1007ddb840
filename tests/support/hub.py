"""A Hugging Face Hub on this machine: what `lmlib push` asks of it, by HTTP."""

import base64
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from huggingface_hub import ModelCard


class Hub(BaseHTTPRequestHandler):
    """Repositories by name: `private`, and `files` with their content; large ones go by LFS."""

    def log_message(self, *_):
        pass

    def answer(self, status: int, content: dict | None = None, **headers: str):
        body = json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def handle_one_request(self):
        super().handle_one_request()
        self.close_connection = True

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def repository(self) -> dict | None:
        owner, name = self.path.split("?")[0].removeprefix("/api/models/").split("/")[:2]
        return self.server.repositories.get(f"{owner}/{name.removesuffix('.git')}")

    def do_GET(self):  # noqa: N802
        if (found := self.repository()) is None:
            self.answer(404, X_Error_Code="RepoNotFound")
        else:
            self.answer(200, {"id": "owner/name", "private": found["private"], "siblings": []})

    def do_PUT(self):  # noqa: N802
        self.server.objects[self.path.split("/")[-1]] = self.body()
        self.answer(507 if self.server.is_full else 200)

    def do_POST(self):  # noqa: N802
        body = self.body()
        if self.headers.get("Authorization") != "Bearer good":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.server.repositories:
                return self.answer(409, {"error": "exists"})
            private = asked["visibility"] == "private"
            self.server.repositories[name] = {"private": private, "files": {}}
            return self.answer(200, {"url": f"{self.server.url}/{name}"})
        if self.path == "/api/validate-yaml":
            card = ModelCard(json.loads(body)["content"])  # raises what the Hub refuses
            return self.answer(200, {"warnings": [], "errors": [] if card.data.tags else ["tags"]})
        if "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if self.path.endswith("/objects/batch"):
            objects = [
                {**file, "actions": {"upload": {"href": f"{self.server.url}/lfs/{file['oid']}"}}}
                for file in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        files = self.repository()["files"]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        return self.answer(
            200, {"commitUrl": f"{self.server.url}/owner/name/commit/1", "commitOid": "1"}
        )


@contextmanager
def hub():
    """Serve a Hub without repositories; yield the server, with its `url`, `repositories` and `is_full`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repositories, server.objects, server.is_full = {}, {}, False
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
