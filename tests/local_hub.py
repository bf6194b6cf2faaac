"""A Hub of our own: a real HTTP server with the calls that `huggingface_hub` makes to publish and to load."""

import base64
import hashlib
import json
import threading
import time
from functools import lru_cache

import uvicorn
from fastapi import FastAPI, Request, Response


@lru_cache
def digest(content: bytes) -> str:
    """Kept, for every call asks for a commit, which is that of all files."""
    return hashlib.sha1(content).hexdigest()


class Hub(threading.Thread):
    """
    Serves on a free port while it is entered.

    Attributes:
        endpoint (`str`): for `HF_ENDPOINT`.
        files (`dict`): what was committed: repository -> revision -> name -> bytes.
        calls (`list[str]`): methods and paths, in order.
    """

    def __init__(self, refuse_card: str = ""):
        super().__init__(daemon=True)
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.calls: list[str] = []
        self.refuse_card = refuse_card
        self.server = uvicorn.Server(uvicorn.Config(self._app(), port=0, log_level="error"))

    def __enter__(self) -> "Hub":
        self.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_) -> None:
        self.server.should_exit = True
        self.join()

    def run(self) -> None:
        self.server.run()

    def sha(self, repository: str, revision: str) -> str:
        """The commit that a revision stands for: by content."""
        for branch, files in self.files[repository].items():
            commit = digest(repr([(name, digest(files[name])) for name in sorted(files)]).encode())
            if revision in (branch, commit):
                return commit
        raise KeyError(revision)

    def _find(self, repository: str, revision: str) -> dict[str, bytes]:
        commit = self.sha(repository, revision)
        return next(
            files for branch, files in self.files[repository].items() if self.sha(repository, branch) == commit
        )

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def record(request: Request, call_next):
            self.calls.append(f"{request.method} {request.url.path}")
            return await call_next(request)

        @app.post("/api/validate-yaml")
        async def validate(request: Request):
            content = (await request.json())["content"]
            if self.refuse_card and self.refuse_card in content:
                return Response(f'- Error: "{self.refuse_card}" is not allowed', status_code=400)
            return {"errors": [], "warnings": []}

        @app.post("/api/repos/create")
        async def create(request: Request):
            body = await request.json()
            name = f"{body['organization']}/{body['name']}" if body.get("organization") else body["name"]
            if name in self.files:
                return Response(json.dumps({"url": f"{self.endpoint}/{name}"}), status_code=409)
            self.files[name] = {"main": {}}
            return {"url": f"{self.endpoint}/{name}"}

        @app.post("/api/models/{owner}/{name}/branch/{branch}")
        async def branch(owner: str, name: str, branch: str):
            self.files[f"{owner}/{name}"].setdefault(branch, {})
            return {}

        @app.post("/api/models/{owner}/{name}/preupload/{revision}")
        async def preupload(request: Request):
            files = (await request.json())["files"]
            return {
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            }

        @app.post("/api/models/{owner}/{name}/commit/{revision}")
        async def commit(owner: str, name: str, revision: str, request: Request):
            files = self.files[f"{owner}/{name}"][revision]
            for line in (await request.body()).splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            commit = self.sha(f"{owner}/{name}", revision)
            url = f"{self.endpoint}/{owner}/{name}/commit/{commit}"
            return {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""}

        @app.get("/api/models/{owner}/{name}")
        @app.get("/api/models/{owner}/{name}/revision/{revision}")
        async def information(owner: str, name: str, revision: str = "main"):
            repository = f"{owner}/{name}"
            try:
                files, commit = self._find(repository, revision), self.sha(repository, revision)
            except KeyError:
                return Response("not found", 404, headers={"X-Error-Code": "RevisionNotFound"})
            return {"id": repository, "sha": commit, "siblings": [{"rfilename": file} for file in files]}

        @app.get("/api/models/{owner}/{name}/tree/{revision}")
        @app.get("/api/models/{owner}/{name}/tree/{revision}/{path:path}")
        async def tree(owner: str, name: str, revision: str, path: str = ""):
            files = self._find(f"{owner}/{name}", revision)
            found = [file for file in files if file.startswith(path)]
            if path and not found:
                return Response("not found", 404, headers={"X-Error-Code": "EntryNotFound"})
            return [{"type": "file", "path": file, "size": len(files[file]), "oid": "0"} for file in found]

        @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
        async def resolve(owner: str, name: str, revision: str, path: str, request: Request):
            repository = f"{owner}/{name}"
            try:
                files, commit = self._find(repository, revision), self.sha(repository, revision)
            except KeyError:
                return Response("not found", 404, headers={"X-Error-Code": "RevisionNotFound"})
            if path not in files:
                headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
                return Response("not found", 404, headers=headers)
            content = files[path]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{digest(content)}"'}
            headers["Content-Length"] = str(len(content))
            return Response(b"" if request.method == "HEAD" else content, headers=headers)

        return app
