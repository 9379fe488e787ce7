"""Uploads a run's files to the Hub: private by default, and only files that the Hub does not have."""

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
from dpokit.push.bundle import Bundle, BundleFile
from dpokit.push.choose_weights import WEIGHTS
from dpokit.push.permissions import check_push, explain_refusals, find_hub_token
from dpokit.push.retry import RetryPolicy

# Files of an earlier push that `from_pretrained` would load beside, or instead of, the new ones.
STALE = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class PushTarget:
    """The repository and branch of a push.

    Attributes:
        repo_id: USER/NAME.
        public: whether everybody can see the repository.
        revision: a branch, created if it is missing; None for main.
        message: the commit's message; None for a default one.
    """

    repo_id: str
    public: bool = False
    revision: str | None = None
    message: str | None = None

    def flags(self) -> list[str]:
        """The flags of `dpokit push` for this target, without --repo-id."""
        flags = ["--public"] if self.public else []
        flags += ["--revision", self.revision] if self.revision else []
        return flags + (["--commit-message", self.message] if self.message else [])

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return {"repo_id": self.repo_id, "private": not self.public, "revision": self.revision or "main"}

    def describe(self) -> str:
        """The record as one line of text."""
        return f"to {self.repo_id}, {'public' if self.public else 'private'}, branch {self.revision or 'main'}"


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    Attributes:
        url: address of the repository's branch.
        commit: the commit that holds the files.
        sent: paths of new and changed files.
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
        """The record as text, the address last."""
        lines = [f"sent {path}" for path in self.sent] + [f"removed {path}" for path in self.removed]
        return "\n".join([*(lines or ["nothing to send: the Hub has all files"]), self.url])


def check_target(target: PushTarget, *, token: str | None = None, retry: RetryPolicy | None = None) -> None:
    """Checks the token's rights as `check_push`, and the visibility of a repository that exists.

    Raises: SettingsError, HubError: as `push_bundle`, but before there is anything to send.
    """
    retry, repo_id = retry or RetryPolicy(), target.repo_id
    check_push(repo_id, token=token, retry=retry)
    token = find_hub_token(token)
    with explain_refusals(token), suppress(RepositoryNotFoundError):
        private = retry.call("model_info", lambda: HfApi(token=token).model_info(repo_id)).private
        _check_visibility(bool(private), target)


def push_bundle(
    bundle: Bundle, target: PushTarget, *, token: str | None = None, retry: RetryPolicy | None = None
) -> Pushed:
    """Sends the files that the Hub does not have in one commit, then compares all files on the Hub with the local ones.

    Only one process calls it: it has no collective operations. It never changes a local file.

    Args:
        bundle: the files.
        target: the repository.
        token, retry: as for `check_push`.

    Raises:
        SettingsError, HubError: as `check_push`; the repository's visibility differs from the target's; the Hub
            refuses, keeps failing, or holds other contents at the end.
    """
    retry = retry or RetryPolicy()
    token = find_hub_token(token)
    api, repo_id = HfApi(token=token), target.repo_id
    with explain_refusals(token, again=find_command(bundle, target)):
        check_push(repo_id, token=token, retry=retry)
        retry.call("create_repo", lambda: api.create_repo(repo_id, private=not target.public, exist_ok=True))
        _check_visibility(bool(retry.call("model_info", lambda: api.model_info(repo_id)).private), target)
        if target.revision is not None:
            branch = target.revision
            retry.call("create_branch", lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
        sent: dict[str, None] = {}
        removed: dict[str, None] = {}
        retry.call("sending", lambda: _send(api, bundle, target, sent=sent, removed=removed))
        held = retry.call("comparing", lambda: _list_files(api, target))
        changed = [file.path for file in bundle.files if not _is_held(file, held)]
        if changed:
            raise HubError(
                f"the Hub accepted the commit, but {repo_id} holds other contents for {', '.join(changed)}",
                expected="the files that were sent",
                do="check that nobody else pushes to it, and that its .gitignore names none of them; then push again",
            )
        commit = retry.call("model_info", lambda: api.model_info(repo_id, revision=target.revision)).sha
    branch_url = f"/tree/{target.revision}" if target.revision else ""
    return Pushed(f"{api.endpoint}/{repo_id}{branch_url}", str(commit), tuple(sent), tuple(removed))


def find_command(bundle: Bundle, target: PushTarget) -> str:
    """The shell command that repeats the push."""
    command = ["dpokit", "push", str(bundle.run.path), "--repo-id", target.repo_id, "--weights", bundle.weights]
    command += ["--base-model", bundle.base_model] if bundle.base_model else []
    return shlex.join([*command, *target.flags()])


def _send(api: HfApi, bundle: Bundle, target: PushTarget, *, sent: dict[str, None], removed: dict[str, None]) -> None:
    """Tries once, and adds to `sent` and `removed`. Compares with the Hub first: a retry sends nothing twice."""
    held, names = _list_files(api, target), {file.path for file in bundle.files}
    missing = [file for file in bundle.files if not _is_held(file, held)]
    stale = [path for path in held if path not in names and _is_stale(path)]
    sent |= dict.fromkeys(file.path for file in missing)
    removed |= dict.fromkeys(stale)
    if missing or stale:
        size = sum(file.size_bytes for file in missing)
        say(f"sending {len(missing)} of {len(bundle.files)} files, {size:,} bytes, to {target.repo_id}")
        api.create_commit(
            target.repo_id,
            [*map(_build_operation, missing), *map(CommitOperationDelete, stale)],
            commit_message=target.message or f"{WEIGHTS[bundle.weights]}, by dpokit",
            revision=target.revision,
        )


def _build_operation(file: BundleFile) -> CommitOperationAdd:
    operation = CommitOperationAdd(file.path, file.source if file.content is None else file.content)
    if "sha256" in vars(file):  # already computed for the comparison
        operation.upload_info.sha256 = bytes.fromhex(file.sha256)
    return operation


def _list_files(api: HfApi, target: PushTarget) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(target.repo_id, recursive=True, revision=target.revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _is_held(file: BundleFile, held: Mapping[str, RepoFile]) -> bool:
    """Whether the Hub has this content under this path. Hashes the file only if the sizes are equal."""
    entry = held.get(file.path)
    if entry is None or entry.size != file.size_bytes:
        return False
    return entry.lfs.sha256 == file.sha256 if entry.lfs else entry.blob_id == file.git_sha1


def _is_stale(path: str) -> bool:
    name = path.removeprefix("adapter/")
    return name in STALE or (name.startswith("model-") and name.endswith(".safetensors") and "-of-" in name)


def _check_visibility(private: bool, target: PushTarget) -> None:
    if private and target.public:
        raise HubError(
            f"--public, but {target.repo_id} is private",
            expected="a public repository, or a push without --public",
            do=f"leave --public out, or make it public: hf repos settings {target.repo_id} --public",
        )
    if not private and not target.public:
        raise HubError(
            f"{target.repo_id} is public: everybody would see the files; nothing was sent",
            expected="a private repository, or --public (when training: --hub_private_repo false)",
            do=f"add --public, use another --repo-id, or make it private: hf repos settings {target.repo_id} --private",
        )
