"""Checks that the Hub will accept a push, and turns its refusals into error messages."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Never

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dpokit.errors import HubError, SettingsError
from dpokit.push.retry import RetryPolicy, find_failure, shorten_error

TOKENS_PAGE = "https://huggingface.co/settings/tokens"


def check_repo_id(repo_id: str) -> None:
    """Raises SettingsError if the id is not USER/NAME. Sends no request."""
    try:
        validate_repo_id(repo_id)
        trouble = "" if repo_id.count("/") == 1 else "it names no user or organisation"
    except HFValidationError as error:
        trouble = str(error)
    if trouble:
        raise SettingsError(
            f"--repo-id {repo_id}: {trouble}", expected="USER/NAME or ORGANISATION/NAME", do="correct --repo-id"
        )


def check_push(repo_id: str, *, token: str | None = None, retry: RetryPolicy | None = None) -> None:
    """Asks the Hub who owns the token and whether it may write to the repository; also called before training.

    Args:
        repo_id: the target repository.
        token: None for huggingface_hub's own (HF_TOKEN, or `hf auth login`).
        retry: how often and how long failed requests are repeated.

    Raises:
        SettingsError: the id is not USER/NAME, there is no token, or the offline mode is on.
        HubError: the token is unknown, or may not write there; the Hub keeps failing.
    """
    check_repo_id(repo_id)
    token = find_hub_token(token)
    with explain_refusals(token):
        account = (retry or RetryPolicy()).call("whoami", lambda: HfApi(token=token).whoami())
    _check_rights(account, repo_id)


def find_hub_token(token: str | None) -> str:
    """Returns `token`, or huggingface_hub's own. Raises: SettingsError without a token, or in the offline mode."""
    if is_offline_mode():
        raise SettingsError(
            "the push needs the Hub, but HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set",
            expected="a network, or --dry-run",
            do="unset HF_HUB_OFFLINE",
        )
    token = token or get_token()
    if not token:
        raise SettingsError(
            "there is no token for the Hub",
            expected="a token that may write",
            do=f"hf auth login, or HF_TOKEN ({TOKENS_PAGE})",
        )
    if not token.isascii() or not token.isprintable() or " " in token:  # the client's own message would show it
        raise SettingsError(
            "the Hub's token holds a character that no token has", expected="the token alone", do="hf auth login"
        )
    return token


def _check_rights(account: Mapping[str, Any], repo_id: str) -> None:
    user, namespace = str(account["name"]), repo_id.partition("/")[0]
    access = account.get("auth", {}).get("accessToken", {})

    def refuse(reason: str, expected: str, do: str) -> Never:
        raise HubError(reason, expected=expected, do=do)

    if access.get("role") == "read":
        refuse(f"the token of {user} may read, and not write", "a token that may write", f"create one: {TOKENS_PAGE}")
    roles = {str(org["name"]): org.get("roleInOrg") for org in account.get("orgs", [])}
    if namespace != user and namespace not in roles:
        allowed = " or ".join(f"{name}/NAME" for name in (user, *sorted(roles)))
        refuse(
            f"--repo-id {repo_id}: {namespace} is neither {user} nor one of their organisations",
            allowed,
            "correct --repo-id",
        )
    if roles.get(namespace) == "read":
        refuse(
            f"{user} may read, and not write, in {namespace}", "a role there that may write", "ask its administrator"
        )
    if access.get("role") == "fineGrained" and not _may_write(access.get("fineGrained", {}), repo_id):
        refuse(
            f"the fine-grained token of {user} may not write to {repo_id}",
            f"the permission repo.write for {namespace} or for {repo_id}",
            f"edit the token: {TOKENS_PAGE}",
        )


def _may_write(grants: Mapping[str, Any], repo_id: str) -> bool:
    if "repo.write" in grants.get("global", []):
        return True
    names = (repo_id, repo_id.partition("/")[0])
    scoped = [grant for grant in grants.get("scoped", []) if grant.get("entity", {}).get("name") in names]
    return any("repo.write" in grant.get("permissions", []) for grant in scoped)


@contextmanager
def explain_refusals(token: str, *, again: str | None = None) -> Iterator[None]:
    """Turns the Hub's refusals into HubErrors.

    Args:
        token: hidden in messages.
        again: the command that continues, named in each message.
    """
    go_on = f"; then: {again}" if again else ""
    try:
        yield
    except HubError as error:
        if again is None or error.__cause__ is None:
            raise
        raise HubError(
            error.seen, expected=error.expected, do=f"{error.do}; the local files are unchanged. Then: {again}"
        ) from error
    except Exception as error:
        failure = find_failure(error)
        if failure is None and not isinstance(error, (ValueError, OSError, RuntimeError)):
            raise
        message = shorten_error(error).replace(token, "***")
        if failure is None and not isinstance(error, ValueError):  # an error of hf_xet, or of a local file
            raise HubError(
                f"the push failed: {type(error).__name__}: {message}",
                expected="answers from the Hub itself, and readable local files",
                do=f"read the message, and check whether a proxy answers instead of the Hub{go_on}",
            ) from error
        status = None if failure is None else failure.status
        reasons = {
            401: ("a token that the Hub knows", "hf auth login, or set a new HF_TOKEN"),
            403: ("a token that may write there", f"use a write token ({TOKENS_PAGE}), or another --repo-id"),
            404: ("a repository that the token may see", "correct --repo-id or --revision"),
            409: ("no other push at the same time", "wait for the other one"),
            412: ("no other push at the same time", "wait for the other one"),
        }
        expected, do = reasons.get(status or 0, ("files and a card that the Hub accepts", "read its message"))
        raise HubError(f"the Hub refuses: {message}", expected=expected, do=do + go_on) from error
