"""A local Hugging Face Hub for models, which speaks the protocols of the real client: LFS and Xet.

It runs in threads of the test: `hub.requests` has every request in order, `hub.faults` the faults to inject.
"""

import base64
import hashlib
import json
import re
import shutil
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

from hub_http import Connection, Fault

WRITE, READ, FINE = "hf_localwrite0123456789", "hf_localread0123456789", "hf_localfine0123456789"


class LocalHub(ThreadingHTTPServer):
    """Keeps blobs in `root`/blobs by their sha256, and uploads of hf_xet in `root`/xet."""

    daemon_threads = True

    def __init__(self, root: Path, *, part_bytes: int | None = None) -> None:
        self.root, self.part_bytes, self.lock = root, part_bytes, threading.RLock()
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.repos: dict[str, dict] = {}
        self.whoami = {
            token: {
                "type": "user",
                "name": "tester",
                "orgs": [{"name": "crew", "roleInOrg": "write"}, {"name": "guests", "roleInOrg": "read"}],
                "auth": {"type": "access_token", "accessToken": {"displayName": "local", "role": role}},
            }
            for token, role in ((WRITE, "write"), (READ, "read"), (FINE, "fineGrained"))
        }
        for name in ("blobs", "parts", "xet"):
            (root / name).mkdir(parents=True)
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """Prints nothing: tests cut clients off and kill them."""

    def asked(self, match: str) -> list[str]:
        """The requests that match."""
        return [line for line in self.requests if re.search(match, line)]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, dict]:
        """The files of a branch: {path: {size, oid, sha256, lfs}}."""
        repo = self.repos[repo_id]
        return repo["commits"][repo["refs"][revision]]["files"]

    def read(self, repo_id: str, path: str) -> bytes:
        """The content of a file that was not uploaded through Xet."""
        return (self.root / "blobs" / self.files(repo_id)[path]["sha256"]).read_bytes()

    def count_blobs(self) -> int:
        """The number of stored blobs, committed or not."""
        return len(list((self.root / "blobs").iterdir()))

    def keep(self, content: bytes) -> dict:
        sha256 = hashlib.sha256(content).hexdigest()
        (self.root / "blobs" / sha256).write_bytes(content)
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"sha256": sha256, "size": len(content), "oid": oid, "lfs": False}

    def find_xet_hash(self, sha256: str) -> str | None:
        """The Xet hash of a file, from hf_xet's shards: 48-byte records, hashes as 4 little-endian u64."""
        for shard in (self.root / "xet").rglob("shards/*.mdb"):
            data, at = shard.read_bytes(), 48
            while at < len(data) and data[at : at + 32] != b"\xff" * 32:
                file, (flags, entries) = data[at : at + 32], struct.unpack("<II", data[at + 32 : at + 40])
                at += 48 * (1 + entries + (entries if flags >> 31 else 0))
                if flags >> 30 & 1:
                    if _hex(data[at : at + 32]) == sha256:
                        return _hex(file)
                    at += 48
        return None


def _hex(data: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))


@contextmanager
def serve(root: Path, *, part_bytes: int | None = None) -> Iterator[LocalHub]:
    """A Hub while the block runs."""
    hub = LocalHub(root, part_bytes=part_bytes)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Handler(Connection):
    """Answers requests like the Hub."""

    def may(self, *, write: bool = False) -> bool:
        """Whether the caller has permission; if not, the refusal is sent already."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        self.who = self.server.whoami.get(token)
        if (token or write) and not self.who:
            self.refuse(401, "Invalid username or password.")
            return False
        if write and self.who["auth"]["accessToken"]["role"] == "read":
            self.refuse(403, "You don't have the rights to write with this token.")
            return False
        return True

    def find_files(self, repo_id: str, revision: str):
        """(repository, commit, files); None if the refusal is sent already."""
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo["private"] and not self.who):
            return self.refuse(404 if self.who else 401, "Repository not found", "RepoNotFound")
        commit = repo["refs"].get(revision, revision)
        if commit not in repo["commits"]:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, commit, repo["commits"][commit]["files"]

    def get_whoami(self) -> None:
        if self.may():
            self.reply(200, self.who) if self.who else self.refuse(401, "Invalid username or password.")

    def validate_card(self) -> None:
        content = json.loads(self.body())["content"]
        errors = [{"message": '"license" must be one of the known'}] if "license: placeholder" in content else []
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def create_repo(self) -> None:
        if not self.may(write=True):
            return None
        request, hub = json.loads(self.body()), self.server
        repo_id = f"{request.get('organization') or self.who['name']}/{request['name']}"
        record = {"url": f"{hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        with hub.lock:
            if repo_id in hub.repos:
                return self.reply(409, record | {"error": "You already created this model repo"})
            first = hashlib.sha1(repo_id.encode()).hexdigest()
            files = {".gitattributes": hub.keep(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}
            private = request.get("visibility") == "private"
            hub.repos[repo_id] = {"private": private, "refs": {"main": first}, "commits": {first: {"files": files}}}
        return self.reply(200, record)

    def create_branch(self, repo_id: str, branch: str) -> None:
        if self.may(write=True) and (found := self.find_files(repo_id, "main")):
            self.body()
            if branch in found[0]["refs"]:
                return self.reply(409, {"error": "Reference already exists"})
            found[0]["refs"][branch] = found[1]
            self.reply(200, {})
        return None

    def get_info(self, repo_id: str, revision: str = "main") -> None:
        if self.may() and (found := self.find_files(repo_id, revision)):
            named = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": found[1], "tags": []}
            siblings = [{"rfilename": path} for path in found[2]]
            self.reply(200, named | {"private": found[0]["private"], "siblings": siblings})

    def get_tree(self, repo_id: str, revision: str, below: str = "/") -> None:
        if self.may() and (found := self.find_files(repo_id, revision)):
            entries = []
            for path, file in found[2].items():
                entry = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
                large = (
                    {"lfs": {"oid": file["sha256"], "size": file["size"], "pointerSize": 134}} if file["lfs"] else {}
                )
                entries += [entry | large] if f"/{path}".startswith(below) else []
            self.reply(200, entries)

    def preupload(self, repo_id: str, revision: str) -> None:
        if self.may(write=True) and (found := self.find_files(repo_id, revision)):
            entries = []
            for file in json.loads(self.body())["files"]:
                mode = "lfs" if file["path"].endswith((".safetensors", ".model", ".png")) else "regular"
                oid = found[2].get(file["path"], {}).get("oid")
                entries.append({"path": file["path"], "shouldIgnore": False, "oid": oid, "uploadMode": mode})
            self.reply(200, {"files": entries})

    def lfs_batch(self, repo_id: str) -> None:
        if not self.may(write=True):
            return
        hub, entries = self.server, []
        for requested in json.loads(self.body())["objects"]:
            oid, size = requested["oid"], requested["size"]
            entries.append(entry := {"oid": oid, "size": size, "authenticated": True})
            if (hub.root / "blobs" / oid).exists():
                continue  # an entry without actions means that the Hub has the blob
            href, parts = f"{hub.url}/_lfs/part/{oid}/", -(-size // hub.part_bytes) if hub.part_bytes else 1
            upload = {"href": f"{href}whole?X-Amz-Signature=signed"}
            if parts > 1:
                numbered = {str(part): f"{href}{part}" for part in range(1, parts + 1)}
                upload = {"href": f"{hub.url}/_lfs/complete/{oid}"}
                upload["header"] = {"chunk_size": str(hub.part_bytes), **numbered}
            entry["actions"] = {"upload": upload}
        transfer = "multipart" if hub.part_bytes else "basic"
        self.reply(200, {"transfer": transfer, "objects": entries}, kind="application/vnd.git-lfs+json")

    def lfs_store(self, pieces: Iterator[bytes], oid: str, part: str) -> None:
        received, digest = self.server.root / "parts" / uuid.uuid4().hex, hashlib.sha256()
        with received.open("wb") as file:
            for data in pieces:
                file.write(data)
                digest.update(data)
        if part == "whole" and digest.hexdigest() != oid:
            return self.refuse(400, "sha256 does not match")
        root = self.server.root
        received.replace(root / "blobs" / oid if part == "whole" else root / "parts" / f"{oid}.{part}")
        return self.reply(200, {}, {"ETag": f'"{digest.hexdigest()}"'})

    def lfs_put(self, oid: str, part: str) -> None:
        self.lfs_store(self.pieces(), oid, part)

    def lfs_complete(self, oid: str) -> None:
        number = len(json.loads(self.body())["parts"])
        parts = (self.server.root / "parts" / f"{oid}.{part}" for part in range(1, number + 1))
        self.lfs_store((part.read_bytes() for part in parts), oid, "whole")

    def xet_token(self, repo_id: str, kind: str, revision: str) -> None:
        if self.may(write=kind == "write"):  # with an address local:// hf_xet keeps its content in a folder
            cas, expires = f"local://{(self.server.root / 'xet').resolve()}", int(time.time()) + 3600
            headers = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": expires}
            self.reply(200, {"accessToken": "x", "exp": expires, "casUrl": cas}, headers)

    def commit(self, repo_id: str, revision: str) -> None:
        hub = self.server
        with hub.lock:
            if not self.may(write=True) or not (found := self.find_files(repo_id, revision)):
                return None
            repo, parent, files = found[0], found[1], dict(found[2])
            for operation in map(json.loads, self.body().splitlines()):
                key, value = operation["key"], operation["value"]
                if key == "file":
                    files[value["path"]] = hub.keep(base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    sha256 = value["oid"]
                    if not (hub.root / "blobs" / sha256).exists() and not hub.find_xet_hash(sha256):
                        return self.refuse(400, f"LFS object {sha256} was never uploaded")
                    files[value["path"]] = {"sha256": sha256, "size": value["size"], "oid": sha256, "lfs": True}
                elif key == "deletedFile":
                    del files[value["path"]]
            commit = hashlib.sha1(f"{parent}{uuid.uuid4()}".encode()).hexdigest()
            repo["commits"][commit] = {"files": files}
            repo["refs"][revision] = commit
        return self.reply(
            200, {"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{repo_id}/commit/{commit}"}
        )

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        if not self.may() or not (found := self.find_files(repo_id, revision)):
            return None
        if not (file := found[2].get(path)):
            return self.refuse(404, "Entry not found", "EntryNotFound")
        blob = self.server.root / "blobs" / file["sha256"]
        headers = {"X-Repo-Commit": found[1], "ETag": f'"{file["oid"]}"', "Accept-Ranges": "bytes"}
        if not blob.exists():  # uploaded through Xet: the headers tell hf_xet where to read it
            headers |= {"X-Xet-Hash": self.server.find_xet_hash(file["sha256"]), "X-Linked-Size": file["size"]}
            address = f"{self.server.url}/api/models/{repo_id}/xet-read-token/{found[1]}"
            headers |= {"X-Linked-Etag": headers["ETag"], "Link": f'<{address}>; rel="xet-auth"'}
        size, start, status = file["size"], 0, 200
        if match := re.match(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, status = int(match[1]), 206
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.reply(status, b"", headers | {"Content-Length": size - start}, "application/octet-stream")
        if self.command == "GET":
            with blob.open("rb") as source:
                source.seek(start)
                shutil.copyfileobj(source, self.wfile)
        return None


REPO, OID = r"(?P<repo_id>[^/]+/[^/]+)", "(?P<oid>[0-9a-f]{64})"
MODEL = f"/api/models/{REPO}"
Handler.routes = (
    ("GET", "/api/whoami-v2", Handler.get_whoami),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("POST", "/api/validate-yaml", Handler.validate_card),
    ("GET", f"{MODEL}(/revision/(?P<revision>.+))?", Handler.get_info),
    ("GET", rf"{MODEL}/tree/(?P<revision>[^/]+)(?P<below>/.*)?", Handler.get_tree),
    ("POST", f"{MODEL}/branch/(?P<branch>.+)", Handler.create_branch),
    ("POST", f"{MODEL}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", f"{MODEL}/commit/(?P<revision>.+)", Handler.commit),
    ("GET", f"{MODEL}/xet-(?P<kind>read|write)-token/(?P<revision>.+)", Handler.xet_token),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", rf"/_lfs/part/{OID}/(?P<part>\w+)", Handler.lfs_put),
    ("POST", f"/_lfs/complete/{OID}", Handler.lfs_complete),
    ("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
)
