# SPDX-License-Identifier: Apache-2.0
"""
A model hub on loopback: what huggingface_hub's client asks a hub for, over HTTP, with the hub's refusals.

    with HubServer() as hub:
        subprocess.run(command, env={**os.environ, **hub.client_env(home), "HF_TOKEN": WRITE_TOKEN})

It knows repositories, branches, pull requests and commits, small files in commits and large ones by LFS, redirects to
a second host for their download, ETags and ranges. It checks whatever the client says: names, sizes, sums, tokens,
parents of commits. Tests read its state (`hub.repos`), its log (`hub.log`) and cut its connections (`hub.cuts`).
"""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml


WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN = "hf_WriteOfAna", "hf_ReadOfAna", "hf_WriteOfBob"
USERS = {WRITE_TOKEN: ("ana", "write"), READ_TOKEN: ("ana", "read"), OTHER_TOKEN: ("bob", "write")}
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.ckpt", "*.pkl")
LFS_ABOVE = 10 * 2**20
REPO_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
BLOCK = 2**14


@dataclass
class File:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        content = self.content
        if self.is_lfs:
            content = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
                self.sha256.encode(),
                len(content),
            )
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id


@dataclass
class Repo:
    """Commits by id, each a complete listing of files, and what the branches and pull requests point to."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, File], parent: str = "") -> str:
        listing = json.dumps({name: file.blob_id for name, file in sorted(files.items())})
        oid = hashlib.sha1(f"{parent} {len(self.commits)} {listing}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def files(self, ref: str = "main") -> dict[str, bytes]:
        """Content of every file that a branch or commit has."""
        return {name: file.content for name, file in self.commits[self.refs.get(ref, ref)].items()}


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, url: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers
        self.body = {"error": message} if url is None else {"error": message, "url": url}


class Cut(Exception):
    """The connection is to be closed without an answer."""


class HubServer:
    """
    Attributes:
        repos: repositories by id.
        lfs: large files that were received, by sha256, whether or not a commit has them.
        log: `(method, path, status)` of every request that was answered, and 0 for one that was cut.
        ranges: the first byte of every download of a large file.
        faults: `[method, substring of the path, status, times]`: the next requests to be answered with a status.
        cuts: `{substring of the path: (bytes, refusals)}`: a download of it breaks off after as many bytes, once, and
            is then refused as often.
        upload_budgets: `{repository: bytes}` it may still receive; when they are spent its connections are cut, and
            every further request is refused. The last byte is the answer to the commit.
        received: bytes that each repository received in uploads and commits.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.log: list[tuple[str, str, int]] = []
        self.ranges: list[int] = []
        self.faults: list[list[Any]] = []
        self.cuts: dict[str, tuple[int, int]] = {}
        self.upload_budgets: dict[str, int] = {}
        self.received: dict[str, int] = {}
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.storage = f"http://localhost:{self.port}"  # another host, as the hub's storage is

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def client_env(self, home: Any) -> dict[str, str]:
        """Environment of a client that knows this hub only and keeps everything under `home`."""
        proxies = {name: "" for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy")}
        return {
            **proxies,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def add_repo(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """A repository with one commit of these files, made without a client."""
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", {name: File(content, is_lfs_path(name)) for name, content in files.items()})
        return repo

    def spend(self, repo_id: str, size: int) -> None:
        """Counts received bytes; raises [`Cut`] where the budget of the repository ends."""
        with self.lock:
            self.received[repo_id] = self.received.get(repo_id, 0) + size
            if repo_id in self.upload_budgets:
                self.upload_budgets[repo_id] -= size
                if self.upload_budgets[repo_id] < 0:
                    raise Cut


def is_lfs_path(path: str, size: int = 0) -> bool:
    return size > LFS_ABOVE or any(fnmatch(path.rsplit("/")[-1], pattern) for pattern in LFS_PATTERNS)


def check_path(path: Any) -> str:
    parts = path.split("/") if isinstance(path, str) else [""]
    if any(part in ("", ".", "..", ".git") for part in parts) or "\\" in path:
        raise Refusal(400, f"Invalid path in repo: {path!r}")
    return path


def metadata_errors(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the YAML at the beginning of a README."""
    match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.S)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"invalid yaml: {error}"], []
    if not isinstance(metadata, dict):
        return ["metadata has to be an object"], []
    errors = []
    if not isinstance(metadata.get("tags", []), list):
        errors.append('"tags" must be an array')
    if not re.fullmatch(r"[a-z0-9.+-]+", str(metadata.get("license", "other"))):
        errors.append('"license" must be one of the known identifiers')
    return errors, []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    # -- the frame of every request --

    def answer(self) -> None:
        self.path_only = unquote(urlsplit(self.path).path)
        self.query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        self.unread = int(self.headers.get("Content-Length") or 0)
        try:
            try:
                self.raise_fault()
                self.route()
            except Refusal as refusal:
                self.refuse(refusal)
        except (Cut, ConnectionError):
            self.hub.log.append((self.command, self.path_only, 0))
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def raise_fault(self) -> None:
        with self.hub.lock:
            for fault in self.hub.faults:
                method, part, status, times = fault
                if method == self.command and part in self.path and times > 0:
                    fault[3] -= 1
                    raise Refusal(status, "Rate limited" if status == 429 else "Internal error")

    def refuse(self, refusal: Refusal) -> None:
        headers = {"X-Error-Message": refusal.message, **refusal.headers}
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        self.send_json(refusal.body, refusal.status, headers)

    def send(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, size: int | None = None
    ) -> None:
        while self.unread > 0:  # or what is left of the body would be taken for the next request
            self.unread -= len(self.rfile.read(min(self.unread, BLOCK))) or self.unread
        self.hub.log.append((self.command, self.path_only, status))
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body) if size is None else size)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def read_body(self, repo_id: str | None = None) -> bytes:
        parts = []
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if repo_id:
                    self.hub.spend(repo_id, size)
            self.rfile.readline()
        while self.unread:
            part = self.rfile.read(min(self.unread, BLOCK))
            if not part:
                raise ConnectionError("the client is gone")
            self.unread -= len(part)
            parts.append(part)
            if repo_id:
                self.hub.spend(repo_id, len(part))
        return b"".join(parts)

    def read_json(self) -> Any:
        try:
            return json.loads(self.read_body())
        except ValueError as error:
            raise Refusal(400, "The body is not JSON") from error

    # -- who may do what --

    def user(self) -> tuple[str, str] | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        if header.removeprefix("Bearer ") not in USERS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return USERS[header.removeprefix("Bearer ")]

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        if self.hub.upload_budgets.get(repo_id, 0) < 0:
            raise Refusal(403, "This hub is gone")
        user, owner = self.user(), repo_id.split("/")[0]
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and (user is None or user[0] != owner)):
            # A private repository looks like none, and the hub asks those without a token for one.
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refusal(401, "Invalid username or password.")
        if write and user != (owner, "write"):
            raise Refusal(403, "You don't have the rights to write to this repository")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # -- the requests --

    def route(self) -> None:
        routes = [
            ("GET", r"/api/whoami-v2", self.who_am_i),
            ("POST", r"/api/repos/create", self.create_repo),
            ("POST", r"/api/validate-yaml", self.validate_yaml),
            ("GET", r"/api/models/([^/]+/[^/]+)", self.info),
            ("GET", r"/api/models/([^/]+/[^/]+)/revision/(.+)", self.info),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+|refs/pr/\d+)/?", self.tree),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", self.create_branch),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", self.create_commit),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.lfs_batch),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/verify", self.lfs_verify),
            ("PUT", r"/storage/([^/]+/[^/]+)/([0-9a-f]{64})", self.lfs_put),
            ("GET", r"/storage/([^/]+/[^/]+)/([0-9a-f]{64})", self.lfs_get),
            ("GET", r"/([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", self.resolve),
        ]
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, handle in routes:
            match = re.fullmatch(pattern, self.path_only)
            if match and wanted == method:
                handle(*match.groups())
                return
        raise Refusal(404, f"No such route: {self.command} {self.path_only}")

    def who_am_i(self) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        self.send_json({"name": user[0], "type": "user", "orgs": [], "auth": {"accessToken": {"role": user[1]}}})

    def create_repo(self) -> None:
        user, asked = self.user(), self.read_json()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        owner, name = asked.get("organization") or user[0], asked.get("name", "")
        if not REPO_NAME.fullmatch(name) or ".." in name or "--" in name or asked.get("type", "model") != "model":
            raise Refusal(400, f"Invalid name or type: {name!r}")
        if user != (owner, "write"):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        url = f"{self.hub.endpoint}/{owner}/{name}"
        with self.hub.lock:
            if f"{owner}/{name}" in self.hub.repos:
                raise Refusal(409, "You already created this model repo", url=url)
            # Older clients say `private`, newer ones `visibility`.
            repo = Repo(asked.get("private") is True or asked.get("visibility") == "private")
            repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
            self.hub.repos[f"{owner}/{name}"] = repo
        self.send_json({"url": url, "name": f"{owner}/{name}", "id": "0"})

    def validate_yaml(self) -> None:
        errors, warnings = metadata_errors(self.read_json()["content"])
        content = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
        self.send_json(content, 400 if errors else 200)

    def info(self, repo_id: str, revision: str = "main") -> None:
        repo = self.repo(repo_id)
        oid = self.commit_of(repo, revision)
        siblings = [{"rfilename": name} for name in repo.commits[oid]]
        common = {"id": repo_id, "modelId": repo_id, "tags": [], "downloads": 0, "likes": 0, "gated": False}
        self.send_json({**common, "sha": oid, "private": repo.private, "disabled": False, "siblings": siblings})

    def tree(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id)
        oid = self.commit_of(repo, revision)
        entries = []
        for name, file in repo.commits[oid].items():
            entry: dict[str, Any] = {"type": "file", "oid": file.blob_id, "size": len(file.content), "path": name}
            if file.is_lfs:
                entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
            entries.append(entry)
        # In pages, as large repositories come.
        start, size = int(self.query.get("cursor", 0)), 8
        headers = {"X-Repo-Commit": oid}
        if start + size < len(entries):
            query = "&".join(f"{key}={value}" for key, value in self.query.items() if key != "cursor")
            url = f"{self.hub.endpoint}{quote(self.path_only)}?{query}&cursor={start + size}"
            headers["Link"] = f'<{url}>; rel="next"'
        self.send_json(entries[start : start + size], headers=headers)

    def create_branch(self, repo_id: str, branch: str) -> None:
        repo, asked = self.repo(repo_id, write=True), self.read_json()
        if branch in repo.refs:
            raise Refusal(409, f"Reference already exists: {branch}")
        repo.refs[branch] = self.commit_of(repo, asked.get("startingPoint", "main"))
        self.send_json({}, 201)

    def preupload(self, repo_id: str, revision: str) -> None:
        repo, asked = self.repo(repo_id, write=True), self.read_json()
        known = repo.commits[self.commit_of(repo, revision)]
        files = []
        if len(asked["files"]) > 256:
            raise Refusal(413, "Too many files at once")
        for file in asked["files"]:
            path, sample = check_path(file["path"]), base64.b64decode(file["sample"], validate=True)
            if not isinstance(file["size"], int) or len(sample) != min(file["size"], 512):
                raise Refusal(400, f"Sample and size of {path} do not agree")
            mode = "lfs" if is_lfs_path(path, file["size"]) else "regular"
            oid = known[path].etag if path in known else None  # by which a client tells what has not changed
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **({"oid": oid} if oid else {})})
        self.send_json({"files": files, "commitOid": self.commit_of(repo, revision)})

    def lfs_batch(self, repo_id: str) -> None:
        self.repo(repo_id, write=True)
        if "application/vnd.git-lfs+json" not in self.headers.get("Accept", ""):
            raise Refusal(406, "Not an LFS client")
        asked = self.read_json()
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256" or "basic" not in asked["transfers"]:
            raise Refusal(422, "Only basic uploads with sha256 sums")
        objects = []
        for wanted in asked["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if not re.fullmatch(r"[0-9a-f]{64}", wanted["oid"]) or wanted["size"] <= 0:
                entry["error"] = {"code": 422, "message": "Invalid object"}
            elif wanted["oid"] not in self.hub.lfs:
                signature = f"size={wanted['size']}&signed=yes"
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.storage}/storage/{repo_id}/{wanted['oid']}?{signature}"},
                    "verify": {"href": f"{self.hub.endpoint}/{repo_id}.git/info/lfs/verify"},
                }
            objects.append(entry)
        self.send_json({"transfer": "basic", "objects": objects})

    def check_signature(self) -> None:
        if self.query.get("signed") != "yes":
            raise Refusal(403, "SignatureDoesNotMatch")
        if "Authorization" in self.headers:
            raise Refusal(400, "Only one auth mechanism allowed")

    def lfs_put(self, repo_id: str, oid: str) -> None:
        self.check_signature()
        if self.hub.upload_budgets.get(repo_id, 0) < 0:
            raise Refusal(403, "This hub is gone")
        content = self.read_body(repo_id)
        if len(content) != int(self.query["size"]) or hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "The content is not what was announced")
        self.hub.lfs[oid] = content
        self.send(200, headers={"ETag": f'"{oid}"'})

    def lfs_verify(self, repo_id: str) -> None:
        self.repo(repo_id, write=True)
        asked = self.read_json()
        if len(self.hub.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "The object was not uploaded")
        self.send_json({})

    def create_commit(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id, write=True)
        if self.headers.get("Content-Type") != "application/x-ndjson":
            raise Refusal(415, "A commit is sent as application/x-ndjson")
        lines = [json.loads(line) for line in self.read_body(repo_id).splitlines()]
        with self.hub.lock:
            head = self.commit_of(repo, revision)
            if not lines or lines[0]["key"] != "header" or not lines[0]["value"].get("summary"):
                raise Refusal(400, "A commit begins with its summary")
            if lines[0]["value"].get("parentCommit", head) != head:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = self.changed_files(repo.commits[head], lines[1:])
            ref = revision
            if self.query.get("create_pr"):
                ref = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repo.refs) + 1}"
            oid = repo.commit(ref, files, head)
        self.hub.spend(repo_id, 1)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}"}
        if ref != revision:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/{ref.rsplit('/')[-1]}"
        self.send_json(answer)

    def changed_files(self, before: dict[str, File], operations: list[dict[str, Any]]) -> dict[str, File]:
        if not operations:
            raise Refusal(400, "Nothing to commit")
        files = dict(before)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = check_path(value["path"])
            if key == "deletedFile":
                if path not in before:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                files.pop(path)
            elif key == "file" and value["encoding"] == "base64":
                content = base64.b64decode(value["content"], validate=True)
                if is_lfs_path(path, len(content)) and content:
                    raise Refusal(400, f"{path} has to be uploaded by LFS")
                files[path] = File(content, False)
            elif key == "lfsFile" and value["algo"] == "sha256":
                content = self.hub.lfs.get(value["oid"], b"")
                if not content or len(content) != value["size"]:
                    raise Refusal(400, f"The LFS object of {path} was not uploaded")
                files[path] = File(content, True)
            else:
                raise Refusal(400, f"Unknown operation {key!r}")
        if "README.md" in files and metadata_errors(files["README.md"].content.decode())[0]:
            raise Refusal(400, "Invalid metadata in README.md")
        return files

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.repo(repo_id)
        oid = self.commit_of(repo, revision)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        file = repo.commits[oid].get(path)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
        if file.is_lfs:
            self.hub.lfs.setdefault(file.sha256, file.content)
            headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
            location = f"{self.hub.storage}/storage/{repo_id}/{file.sha256}?signed=yes&name={quote(path, safe='')}"
            self.send(302, headers={**headers, "ETag": f'"{file.blob_id}"', "Location": location})
        else:
            self.send_content(file.content, {**headers, "ETag": f'"{file.etag}"'})

    def lfs_get(self, repo_id: str, oid: str) -> None:
        self.check_signature()
        if oid not in self.hub.lfs:
            raise Refusal(404, "NoSuchKey")
        self.send_content(self.hub.lfs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def send_content(self, content: bytes, headers: dict[str, str]) -> None:
        status, start, end = 200, 0, len(content)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match:
            start, end = int(match[1]), min(end, int(match[2] or end) + 1)
            if start >= len(content):
                raise Refusal(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"], status = f"bytes {start}-{end - 1}/{len(content)}", 206
        body, size = content[start:end], end - start
        with self.hub.lock:
            if self.command == "GET" and "/storage/" in self.path:
                self.hub.ranges.append(start)
            cut = next((part for part in self.hub.cuts if part in self.path and self.command == "GET"), None)
            if cut is not None:
                after, refusals = self.hub.cuts.pop(cut)
                body = body[: max(0, after - start)]
                self.hub.faults.append(["GET", cut, 403, refusals])
        self.send(status, body, headers, size)
        if len(body) < size and self.command == "GET":
            self.wfile.flush()
            raise Cut
