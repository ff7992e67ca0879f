"""A double of the Hub on loopback, for the unmodified `huggingface_hub` client.

It speaks what a push and a load need: repositories, upload modes, LFS, commits, branches, tags, pull requests, trees
and files, with the Hub's error headers. Clients reach it through `HF_ENDPOINT`; Xet must be disabled: its protocol is
not spoken.
"""

import base64
import json
import re
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub

from helpers.hub.lfs import LfsRoutes
from helpers.hub.repository import ApiError, Fault, Repository, lfs_entry, metadata_of, regular_entry, tree_items


OWNER = "owner"
TOKENS = {"hf_owner_token": OWNER, "hf_visitor_token": "visitor"}
OWNER_TOKEN, VISITOR_TOKEN = TOKENS
# As on the Hub: what Git LFS keeps goes by the file's name, or by its size.
LFS_NAMES = re.compile(r"\.(safetensors|bin|pt|pth|png|jpg|gguf)$")
LFS_SIZE = 10 * 2**20


class HubServer:
    """The server; a context manager that listens while it is open.

    Attributes:
        url: the value for `HF_ENDPOINT`.
        repositories: by id.
        requests: method and path of everything asked.
        part_size: bytes of a part of a multipart upload.
    """

    def __init__(self, root: Path):
        self.blobs = root / "blobs"
        self.blobs.mkdir(parents=True)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        # Objects above this size are asked for in parts of it, as the Hub does above 5 GB; `None` for never.
        self.part_size: int | None = None
        self.parts: dict[tuple[str, int], bytes] = {}
        self.lock = threading.RLock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fail(self, method: str, path: str, status: int, times: int = 1) -> None:
        """Answer the next `times` requests whose path matches with `status`."""
        self.faults.append(Fault(method, path, status, times))

    def cut(self, method: str, path: str, times: int = 1) -> None:
        """Cut the next `times` connections in the middle of what the client sends."""
        self.faults.append(Fault(method, path, None, times))

    def lose_answer(self, method: str, path: str, times: int = 1) -> None:
        """Do what is asked, then cut the connection in the middle of the answer."""
        self.faults.append(Fault(method, path, None, times, carried_out=True))

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return what a revision holds."""
        repository = self.repositories[repo_id]
        entries = repository.commits[repository.resolve(revision)]
        return {path: (self.blobs / entry.sha256).read_bytes() for path, entry in entries.items()}


class Handler(LfsRoutes, BaseHTTPRequestHandler):
    """One request; the routes are at the end of the class."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer

    def log_message(self, *_) -> None:
        pass

    def handle_any(self) -> None:
        self.hub.requests.append((self.command, self.path))
        fault = self.hub.fault(self.command, self.path) or Fault("", "", status=0, times=0)
        self.loses_answer = fault.carried_out
        if fault.status is None and not fault.carried_out:
            self.rfile.read(int(self.headers.get("Content-Length") or 2) // 2)
            return self.drop()
        self.body = self.read_body()
        try:
            if fault.status:
                # No seconds to wait: the client's own waiting is what is tested.
                raise ApiError(fault.status, "The double was told to fail.", **{"Retry-After": "0"})
            self.route()
        except ApiError as error:
            self.answer({"error": str(error)}, error.status, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, content, status: int = 200, headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.loses_answer:
            self.wfile.write(body[: len(body) // 2])
            return self.drop()
        self.wfile.write(body)

    def route(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.user = self.authenticate()
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and self.command in method.split():
                with self.hub.lock:
                    return action(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        raise ApiError(404, f"The double does not know {self.command} {url.path}")

    def authenticate(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        if token not in TOKENS:
            raise ApiError(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def repository(self, repo: str, write: bool = False) -> Repository:
        """Return a repository the user may read or write; to others a private one does not exist."""
        found = self.hub.repositories.get(repo)
        owner = repo.removeprefix("spaces/").split("/")[0]
        if found is None or (found.private and self.user != owner):
            raise ApiError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and self.user is None:
            raise ApiError(401, "Invalid username or password.")
        if write and self.user != owner:
            raise ApiError(403, f"You don't have the rights to write to {repo}")
        return found

    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    # What the client asks for, in the order of a push and a load.

    def whoami(self) -> None:
        if self.user is None:
            raise ApiError(401, "Invalid username or password.")
        self.answer({"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        asked = self.json()
        if self.user is None:
            raise ApiError(401, "Invalid username or password.")
        owner = asked.get("organization") or self.user
        kind = {None: "", "space": "spaces/"}[asked.get("type")]
        repo_id = f"{kind}{owner}/{asked['name']}"
        if owner != self.user:
            raise ApiError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        exists = repo_id in self.hub.repositories
        if not exists:
            repository = Repository(repo_id, private=asked.get("visibility") == "private")
            repository.add("refs/heads/main", {}, "initial commit")
            self.hub.repositories[repo_id] = repository
        answer = {"url": f"{self.hub.url}/{repo_id}", **({"error": "You already created it"} if exists else {})}
        self.answer(answer, 409 if exists else 200)

    def settings(self, repo: str) -> None:
        self.repository(repo, write=True).gated = bool(self.json()["gated"])
        self.answer({})

    def validate_yaml(self) -> None:
        errors = []
        try:
            metadata = metadata_of(self.json()["content"].encode())
            for name in ("license", "library_name", "pipeline_tag"):
                if not isinstance(metadata.get(name, ""), str):
                    errors.append({"message": f'"{name}" must be a string'})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo: str, revision: str) -> None:
        repository = self.repository(repo, write="create_pr" not in self.query)
        entries = repository.commits[repository.resolve(revision)]
        files = []
        for asked in self.json()["files"]:
            path = asked["path"]
            lfs = bool(LFS_NAMES.search(path)) or asked["size"] > LFS_SIZE
            known = entries.get(path)
            oid = None if known is None else known.sha256 if known.lfs else known.oid
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    def commit(self, repo: str, revision: str) -> None:
        pull_request = self.query.get("create_pr") == "1"
        if self.user is None:
            raise ApiError(401, "Invalid username or password.")
        repository = self.repository(repo, write=not pull_request)
        parent = repository.resolve(revision)
        files = dict(repository.commits[parent])
        summary = ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                summary = value["summary"]
                if value.get("parentCommit", parent) != parent:
                    raise ApiError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = regular_entry(self.hub.blobs, base64.b64decode(value["content"]))
            elif key == "lfsFile":
                blob = self.hub.blobs / value["oid"]
                if not blob.exists():
                    raise ApiError(400, f"The LFS object of {value['path']} was never uploaded")
                files[value["path"]] = lfs_entry(value["oid"], blob.stat().st_size)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise ApiError(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                inside = [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]
                for path in inside:
                    del files[path]
        number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
        named = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        ref = f"refs/pr/{number}" if pull_request else named
        commit = repository.add(ref, files, summary)
        answer = {"commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        self.answer(answer)

    def branch(self, repo: str, name: str) -> None:
        repository = self.repository(repo, write=True)
        self.new_ref(repository, f"refs/heads/{name}", self.json().get("startingPoint") or "main")

    def tag(self, repo: str, revision: str) -> None:
        repository = self.repository(repo, write=True)
        self.new_ref(repository, f"refs/tags/{self.json()['tag']}", revision)

    def new_ref(self, repository: Repository, ref: str, revision: str) -> None:
        if ref in repository.refs:
            raise ApiError(409, f"Reference {ref} exists already")
        repository.refs[ref] = repository.resolve(revision)
        self.answer({})

    def delete_tag(self, repo: str, name: str) -> None:
        refs = self.repository(repo, write=True).refs
        if refs.pop(f"refs/tags/{name}", None) is None:
            raise ApiError(404, f"Tag {name} does not exist", "RevisionNotFound")
        self.answer({})

    def refs(self, repo: str) -> None:
        found: dict[str, list] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        kinds = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
        for ref, commit in self.repository(repo).refs.items():
            _, kind, name = ref.split("/", 2)
            found[kinds[kind]].append({"name": name, "ref": ref, "targetCommit": commit})
        self.answer(found)

    def info(self, repo: str, revision: str) -> None:
        repository = self.repository(repo)
        commit = repository.resolve(revision or "main")
        entries = repository.commits[commit]
        card = entries.get("README.md")
        metadata = metadata_of((self.hub.blobs / card.sha256).read_bytes()) if card else {}
        results = [
            {"filename": path, "data": item}
            for path, entry in entries.items()
            if re.fullmatch(r"\.eval_results/[^/]+\.yaml", path)
            for item in yaml.safe_load((self.hub.blobs / entry.sha256).read_bytes())
        ]
        self.answer(
            {
                "id": repo,
                "sha": commit,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "tags": metadata.get("tags", []),
                "pipeline_tag": metadata.get("pipeline_tag"),
                "library_name": metadata.get("library_name"),
                "cardData": metadata,
                "evalResults": results,
                "siblings": [{"rfilename": path} for path in sorted(entries)],
            }
        )

    def tree(self, repo: str, revision: str, folder: str) -> None:
        repository = self.repository(repo)
        commit = repository.resolve(revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: entry for path, entry in repository.commits[commit].items() if path.startswith(prefix)}
        if folder and not inside:
            raise ApiError(404, f"{folder} does not exist", "EntryNotFound", **{"X-Repo-Commit": commit})
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        self.answer(tree_items(inside, prefix, recursive))

    def file(self, repo: str, revision: str, path: str) -> None:
        repository = self.repository(repo)
        if repository.gated and self.user != repo.split("/")[0]:
            raise ApiError(403 if self.user else 401, f"Access to model {repo} is restricted.", "GatedRepo")
        commit = repository.resolve(revision)
        entry = repository.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if entry is None:
            raise ApiError(404, "Entry not found", "EntryNotFound", **headers)
        headers |= {"ETag": f'"{entry.sha256 if entry.lfs else entry.oid}"', "Accept-Ranges": "bytes"}
        if entry.lfs:
            headers |= {"X-Linked-ETag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        content = (self.hub.blobs / entry.sha256).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.answer(content, headers=headers)
        start, end = int(asked[1]), min(int(asked[2] or entry.size - 1), entry.size - 1)
        if start >= entry.size:
            raise ApiError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{entry.size}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{entry.size}"
        self.answer(content[start : end + 1], 206, headers)


# A Space goes by `spaces/user/name`, as in the Hub's addresses.
REPO = r"(?P<repo>(?:spaces/)?[^/]+/[^/]+?)"
API = rf"/api/(?:models/|(?=spaces/)){REPO}"
Action = Callable[..., None]
ROUTES: list[tuple[str, str, Action]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("PUT", rf"{API}/settings", Handler.settings),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/parts/(?P<number>\d+)", Handler.lfs_part),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", Handler.lfs_complete),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", Handler.lfs_verify),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", rf"{API}/branch/(?P<name>[^/]+)", Handler.branch),
    ("POST", rf"{API}/tag/(?P<revision>[^/]+)", Handler.tag),
    ("DELETE", rf"{API}/tag/(?P<name>[^/]+)", Handler.delete_tag),
    ("GET", rf"{API}/refs", Handler.refs),
    ("GET", rf"{API}(/revision/(?P<revision>[^/]+))?", Handler.info),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Handler.tree),
    ("GET HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.file),
]


@contextmanager
def running_hub(folder):
    """The double; the client of this process talks to it as its owner."""
    with HubServer(folder / "hub") as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.url)
        files = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        # Transformers keeps the client that it made first, with that one's address.
        patch.setattr(transformers_hub, "_hf_api", None)
        patch.setenv("HF_TOKEN", OWNER_TOKEN)
        yield server
