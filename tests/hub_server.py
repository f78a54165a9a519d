"""
Serve a Hub on loopback: the part of its HTTP interface that loading and uploading a model use.

    with hub_server(folder) as hub:  # folder/organisation/name is the repository organisation/name
        ...  # HF_ENDPOINT=hub.url

It has one revision, `main`, whose commit is named by a hash of the content. Files with a suffix in `LARGE` are
uploaded by git's protocol for large files, all others in the commit itself. It listens on 127.0.0.1 only.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors",)
TOKEN = "hf_loopback"


class HubServer(ThreadingHTTPServer):
    """
    Attributes:
        requests: Method and path of each request, in order.
        commits: Header of each commit.
        created: Body of each request to create a repository.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.requests: list[str] = []
        self.commits: list[dict] = []
        self.created: list[dict] = []
        self.uploaded: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo: str) -> dict[str, bytes]:
        folder = self.root / repo
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def commit(self, repo: str) -> str:
        digest = hashlib.sha1(repo.encode())
        for name, content in self.files(repo).items():
            digest.update(name.encode() + content)
        return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 30  # for a connection that is kept open

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, status: int = 200, **headers: str) -> None:
        self._answer(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def _refuse(self, code: str, status: int = 404) -> None:
        self._json({"error": code}, status, X_Error_Code=code)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _match(self, pattern: str) -> re.Match | None:
        return re.fullmatch(pattern, unquote(urlsplit(self.path).path))

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        if match := self._match(r"/api/models/([^/]+/[^/]+?)(?:/revision/(\w+))?"):
            self._model(match[1], match[2])
        elif match := self._match(r"/api/models/([^/]+/[^/]+)/tree/(\w+)(?:/(.+))?"):
            self._tree(match[1], match[2], match[3])
        elif match := self._match(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)"):
            self._file(match[1], match[2], match[3])
        elif self._match(r"/api/whoami-v2") and self._has_token():
            self._json({"name": "someone", "type": "user", "orgs": []})
        else:
            self._refuse("RepoNotFound")

    do_HEAD = do_GET

    def _has(self, repo: str, revision: str | None) -> bool:
        if not (self.server.root / repo).is_dir():
            self._refuse("RepoNotFound")
        elif revision not in (None, "main", self.server.commit(repo)):
            self._refuse("RevisionNotFound")
        else:
            return True
        return False

    def _model(self, repo: str, revision: str | None) -> None:
        if self._has(repo, revision):
            names = [{"rfilename": name} for name in self.server.files(repo)]
            commit = self.server.commit(repo)
            self._json({"_id": repo, "id": repo, "sha": commit, "private": False, "tags": [], "siblings": names})

    def _tree(self, repo: str, revision: str, below: str | None) -> None:
        if not self._has(repo, revision):
            return
        prefix = f"{below}/" if below else ""
        files = {name: content for name, content in self.server.files(repo).items() if name.startswith(prefix)}
        if below and not files:
            self._refuse("EntryNotFound")
            return
        self._json([{"type": "file", "path": name, **_describe(name, content)} for name, content in files.items()])

    def _file(self, repo: str, revision: str, name: str) -> None:
        if not self._has(repo, revision):
            return
        content = self.server.files(repo).get(name)
        commit = self.server.commit(repo)
        if content is None:
            self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        described = _describe(name, content)
        etag = described["lfs"]["oid"] if "lfs" in described else described["oid"]
        self._answer(content, ETag=f'"{etag}"', X_Repo_Commit=commit, X_Linked_Size=str(len(content)))

    def do_POST(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        body = self._body()
        if self._match(r"/api/validate-yaml"):
            self._json({})
        elif not self._has_token():
            self._refuse("Unauthorized", 401)
        elif self._match(r"/api/repos/create"):
            self._create(json.loads(body))
        elif match := self._match(r"/api/models/[^/]+/[^/]+/preupload/main"):
            self._json({"files": [_mode(file["path"]) for file in json.loads(body)["files"]]})
        elif match := self._match(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch"):
            self._large_files(json.loads(body))
        elif match := self._match(r"/api/models/([^/]+/[^/]+)/commit/main"):
            self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse("RepoNotFound")

    def _create(self, wanted: dict) -> None:
        self.server.created.append(wanted)
        repo = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        (self.server.root / repo).mkdir(parents=True, exist_ok=True)
        self._json({"url": f"{self.server.url}/{repo}", "id": repo, "name": repo})

    def _large_files(self, wanted: dict) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.server.url}/large/{item['oid']}", "header": {}}}}
            for item in wanted["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        content = self._body()
        match = self._match(r"/large/(\w+)")
        if match is None or hashlib.sha256(content).hexdigest() != match[1]:
            self._refuse("BadRequest", 400)
            return
        self.server.uploaded[match[1]] = content
        self._answer(b"")

    def _commit(self, repo: str, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value)
                continue
            if line["key"] == "deletedFile":
                (self.server.root / repo / value["path"]).unlink()
                continue
            is_large = line["key"] == "lfsFile"
            content = self.server.uploaded[value["oid"]] if is_large else base64.b64decode(value["content"])
            path = self.server.root / repo / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        commit = self.server.commit(repo)
        self._json({"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit})


def _describe(name: str, content: bytes) -> dict:
    described: dict = {"size": len(content), "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
    if name.endswith(LARGE):
        described["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 132}
    return described


def _mode(name: str) -> dict:
    return {"path": name, "uploadMode": "lfs" if name.endswith(LARGE) else "regular", "shouldIgnore": False}


@contextlib.contextmanager
def hub_server(root: Path) -> Iterator[HubServer]:
    """Serve the repositories below a folder while the block runs."""
    server = HubServer(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
