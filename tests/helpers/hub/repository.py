"""What the double of the Hub keeps: repositories of commits over contents on disk."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml


class ApiError(Exception):
    """Ends a request with a status and the headers by which the client tells the reason."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match: a status, or a connection cut half-way.

    Without a status the connection is cut, in the body of the request or, with `carried_out`, in that of the answer.
    """

    method: str
    path: str
    status: int | None
    times: int
    carried_out: bool = False


@dataclass
class Entry:
    """A file of a commit."""

    sha256: str
    size: int
    lfs: bool
    oid: str


@dataclass
class Repository:
    """Commits are snapshots, path to entry; `refs` names commits."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def add(self, ref: str, files: dict[str, Entry], summary: str) -> str:
        parent = self.refs.get(ref)
        text = repr((self.id, parent, summary, sorted(files.items(), key=str), len(self.commits)))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit

    def resolve(self, revision: str) -> str:
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.refs[name]
        found = [commit for commit in self.commits if len(revision) >= 7 and commit.startswith(revision)]
        if not found:
            raise ApiError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]


def store(blobs: Path, content: bytes) -> str:
    sha256 = hashlib.sha256(content).hexdigest()
    (blobs / sha256).write_bytes(content)
    return sha256


def regular_entry(blobs: Path, content: bytes) -> Entry:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return Entry(store(blobs, content), len(content), False, oid)


def lfs_entry(sha256: str, size: int) -> Entry:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return Entry(sha256, size, True, hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest())


def metadata_of(card: bytes) -> dict:
    """Return the YAML head of a model card."""
    head = re.match(r"---\n(.*?)\n---", card.decode(), flags=re.DOTALL)
    return yaml.safe_load(head[1]) or {} if head else {}


def tree_items(entries: dict[str, Entry], prefix: str, recursive: bool) -> list[dict]:
    """Return the answer to a listing of the folder `prefix`, whose files `entries` are."""
    items = {}
    for path, entry in entries.items():
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            name = prefix + "/".join(parts[:depth])
            if recursive or depth == 1:
                items[name] = {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
        if recursive or len(parts) == 1:
            items[path] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
            if entry.lfs:
                items[path]["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}
    return list(items.values())
