"""`dpokit push`: a run's model on the Hub, private unless told otherwise, and only what is not there already."""

import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from dpokit.console import say
from dpokit.errors import HubError
from dpokit.push.bundle import Parcel, ParcelFile
from dpokit.push.choose_weights import WHATS
from dpokit.push.permissions import check_push, explained, find_token
from dpokit.push.retry import Patience

# What an earlier push of this toolkit may have left that would be loaded beside, or instead of, what is sent now.
STALE = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Target:
    """Where a parcel goes.

    Attributes:
        repo_id: USER/NAME.
        public: for everybody to see; else private.
        revision: a branch, made where it is missing; None for the main one.
        message: of the commit; None for a plain one.
    """

    repo_id: str
    public: bool = False
    revision: str | None = None
    message: str | None = None

    def flags(self) -> list[str]:
        """Of `dpokit push`, but for the repository."""
        words = ["--public"] if self.public else []
        words += ["--revision", self.revision] if self.revision else []
        return words + (["--commit-message", self.message] if self.message else [])

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return {"repo_id": self.repo_id, "private": not self.public, "revision": self.revision or "main"}

    def describe(self) -> str:
        """The same in one line."""
        return f"to {self.repo_id}, {'public' if self.public else 'private'}, branch {self.revision or 'main'}"


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        url: of the repository's branch.
        commit: that holds the parcel.
        sent: paths that were new or changed.
        removed: paths of an earlier push that would have been loaded beside them.
    """

    url: str
    commit: str
    sent: tuple[str, ...]
    removed: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def describe(self) -> str:
        """The same for a reader, the address last."""
        lines = [f"sent {path}" for path in self.sent] + [f"removed {path}" for path in self.removed]
        return "\n".join([*(lines or ["nothing to send: the Hub holds it all"]), self.url])


def check_target(target: Target, *, token: str | None = None, patience: Patience | None = None) -> None:
    """As `check_push`; and that the repository, where it is there already, is as private as asked.

    Raises: SettingsError, HubError: as `push_parcel` would, but before anything is there to send.
    """
    patience, repo_id = patience or Patience(), target.repo_id
    check_push(repo_id, token=token, patience=patience)
    token = find_token(token)
    with explained(token), suppress(RepositoryNotFoundError):
        private = patience.ask("model_info", lambda: HfApi(token=token).model_info(repo_id)).private
        _check_visibility(bool(private), target)


def push_parcel(
    parcel: Parcel, target: Target, *, token: str | None = None, patience: Patience | None = None
) -> Pushed:
    """Sends what the Hub does not hold yet, in one commit, and compares what it holds then.

    One process alone calls it: nothing in it is collective. No local file is changed, whatever happens.

    Args:
        parcel: what goes.
        target: where to.
        token, patience: as for `check_push`.

    Raises:
        SettingsError, HubError: as `check_push`; the repository is public and --public was not given, or the other
            way round; the Hub refuses, goes on failing, or holds something else in the end.
    """
    patience = patience or Patience()
    token = find_token(token)
    api, repo_id = HfApi(token=token), target.repo_id
    with explained(token, again=find_command(parcel, target)):
        check_push(repo_id, token=token, patience=patience)
        patience.ask("create_repo", lambda: api.create_repo(repo_id, private=not target.public, exist_ok=True))
        _check_visibility(bool(patience.ask("model_info", lambda: api.model_info(repo_id)).private), target)
        if target.revision is not None:
            branch = target.revision
            patience.ask("create_branch", lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
        sent: dict[str, None] = {}
        removed: dict[str, None] = {}
        patience.ask("sending", lambda: _send(api, parcel, target, sent=sent, removed=removed))
        held = patience.ask("comparing", lambda: _list_files(api, target))
        changed = [file.path for file in parcel.files if not _is_held(file, held)]
        if changed:
            raise HubError(
                f"the Hub took the commit, and {repo_id} holds other contents for {', '.join(changed)}",
                expected="the files that were sent",
                do="see whether somebody else pushes to it, and whether its .gitignore names them; then push again",
            )
        commit = patience.ask("model_info", lambda: api.model_info(repo_id, revision=target.revision)).sha
    branch_url = f"/tree/{target.revision}" if target.revision else ""
    return Pushed(f"{api.endpoint}/{repo_id}{branch_url}", str(commit), tuple(sent), tuple(removed))


def find_command(parcel: Parcel, target: Target) -> str:
    """The one line that pushes the same again."""
    words = ["dpokit", "push", str(parcel.run.path), "--repo-id", target.repo_id, "--what", parcel.what]
    words += ["--base-model", parcel.base_model] if parcel.base_model else []
    return shlex.join([*words, *target.flags()])


def _send(api: HfApi, parcel: Parcel, target: Target, *, sent: dict[str, None], removed: dict[str, None]) -> None:
    """One try; paths sent and removed are added. It begins with what the Hub holds by then: nothing goes twice."""
    held, names = _list_files(api, target), {file.path for file in parcel.files}
    missing = [file for file in parcel.files if not _is_held(file, held)]
    stale = [path for path in held if path not in names and _is_stale(path)]
    sent |= dict.fromkeys(file.path for file in missing)
    removed |= dict.fromkeys(stale)
    if missing or stale:
        size = sum(file.size_bytes for file in missing)
        say(f"sending {len(missing)} of {len(parcel.files)} files, {size:,} bytes, to {target.repo_id}")
        api.create_commit(
            target.repo_id,
            [*map(_build_operation, missing), *map(CommitOperationDelete, stale)],
            commit_message=target.message or f"{WHATS[parcel.what]}, by dpokit",
            revision=target.revision,
        )


def _build_operation(file: ParcelFile) -> CommitOperationAdd:
    operation = CommitOperationAdd(file.path, file.source if file.content is None else file.content)
    if "sha256" in vars(file):  # computed already, to compare
        operation.upload_info.sha256 = bytes.fromhex(file.sha256)
    return operation


def _list_files(api: HfApi, target: Target) -> dict[str, RepoFile]:
    found = api.list_repo_tree(target.repo_id, recursive=True, revision=target.revision)
    return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}


def _is_held(file: ParcelFile, held: Mapping[str, RepoFile]) -> bool:
    """Whether the Hub has this content under this path; a large file is read only where the sizes agree."""
    there = held.get(file.path)
    if there is None or there.size != file.size_bytes:
        return False
    return there.lfs.sha256 == file.sha256 if there.lfs else there.blob_id == file.git_sha1


def _is_stale(path: str) -> bool:
    name = path.removeprefix("adapter/")
    return name in STALE or (name.startswith("model-") and name.endswith(".safetensors") and "-of-" in name)


def _check_visibility(private: bool, target: Target) -> None:
    if private and target.public:
        raise HubError(
            f"--public, and {target.repo_id} is private",
            expected="one of the two",
            do=f"leave --public out, or open it: hf repos settings {target.repo_id} --public",
        )
    if not private and not target.public:
        raise HubError(
            f"{target.repo_id} is public: everybody would see what is sent; nothing was",
            expected="--public (of a run: --hub_private_repo false), or a repository that is private",
            do=f"add --public, name another --repo-id, or close it: hf repos settings {target.repo_id} --private",
        )
