"""The part of the double of the Hub that takes large files, whole or in parts."""

import hashlib
from typing import Any

from helpers.hub.repository import ApiError, store


class LfsRoutes:
    """Routes of Git LFS, mixed into the handler of requests.

    Attributes:
        hub: the server.
        body: what the request sent.
    """

    hub: Any
    body: bytes

    def lfs_batch(self, repo: str) -> None:
        self.repository(repo)
        objects = []
        for asked in self.json()["objects"]:
            item = {"oid": asked["oid"], "size": asked["size"]}
            if not (self.hub.blobs / asked["oid"]).exists():
                href = f"{self.hub.url}/lfs/{asked['oid']}"
                item["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
                if self.hub.part_size and asked["size"] > self.hub.part_size:
                    count = -(-asked["size"] // self.hub.part_size)
                    parts = {f"{number:05}": f"{href}/parts/{number}" for number in range(1, count + 1)}
                    header = {"chunk_size": str(self.hub.part_size), **parts}
                    item["actions"]["upload"] = {"href": f"{href}/complete", "header": header}
            objects.append(item)
        self.answer({"transfer": "multipart" if self.hub.part_size else "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise ApiError(400, "The content does not have the announced SHA-256")
        store(self.hub.blobs, self.body)
        self.answer({})

    def lfs_part(self, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = self.body
        self.answer({}, headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def lfs_complete(self, oid: str) -> None:
        parts = []
        for asked in self.json()["parts"]:
            part = self.hub.parts.pop((oid, asked["partNumber"]), b"")
            if asked["etag"].strip('"') != hashlib.md5(part).hexdigest():
                raise ApiError(400, f"Part {asked['partNumber']} has not arrived")
            parts.append(part)
        self.body = b"".join(parts)
        self.lfs_put(oid)

    def lfs_verify(self, oid: str) -> None:
        blob = self.hub.blobs / oid
        if not blob.exists() or blob.stat().st_size != self.json()["size"]:
            raise ApiError(404, "There is no such object")
        self.answer({})
