"""Whether the Hub will take a push: who the token belongs to, and what it may write. Refusals in the user's words."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Never

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dpokit.errors import HubError, SettingsError
from dpokit.push.retry import Patience, find_failure, plain

TOKENS_PAGE = "https://huggingface.co/settings/tokens"


def check_repo_id(repo_id: str) -> None:
    """Raises SettingsError where it is not USER/NAME; asks nobody."""
    try:
        validate_repo_id(repo_id)
        trouble = "" if repo_id.count("/") == 1 else "it names no user or organisation"
    except HFValidationError as error:
        trouble = str(error)
    if trouble:
        raise SettingsError(
            f"--repo-id {repo_id}: {trouble}", expected="USER/NAME or ORGANISATION/NAME", do="correct --repo-id"
        )


def check_push(repo_id: str, *, token: str | None = None, patience: Patience | None = None) -> None:
    """Asks the Hub who the token belongs to and whether it may write there: before hours of training, not after.

    Args:
        repo_id: where to.
        token: None for the one huggingface_hub finds (HF_TOKEN, or `hf auth login`).
        patience: with a Hub that fails for a while.

    Raises:
        SettingsError: no USER/NAME, no token, or the offline mode.
        HubError: the token is unknown, or may not write there; the Hub goes on failing.
    """
    check_repo_id(repo_id)
    token = find_token(token)
    with explained(token):
        who = (patience or Patience()).ask("whoami", lambda: HfApi(token=token).whoami())
    _check_rights(who, repo_id)


def find_token(token: str | None) -> str:
    """The given token, or the one huggingface_hub finds. Raises: SettingsError where there is none, or no network."""
    if is_offline_mode():
        raise SettingsError(
            "the Hub is to be asked, and HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set",
            expected="a network, or --dry-run",
            do="unset HF_HUB_OFFLINE",
        )
    token = token or get_token()
    if not token:
        raise SettingsError(
            "there is no token of the Hub",
            expected="one that may write",
            do=f"hf auth login, or HF_TOKEN ({TOKENS_PAGE})",
        )
    if not token.isascii() or not token.isprintable() or " " in token:  # the client's own message would show it
        raise SettingsError(
            "the Hub's token holds a character that no token has", expected="the token alone", do="hf auth login"
        )
    return token


def _check_rights(who: Mapping[str, Any], repo_id: str) -> None:
    user, namespace = str(who["name"]), repo_id.partition("/")[0]
    access = who.get("auth", {}).get("accessToken", {})

    def refuse(seen: str, expected: str, do: str) -> Never:
        raise HubError(seen, expected=expected, do=do)

    if access.get("role") == "read":
        refuse(f"the token of {user} may read, and not write", "a token that may write", f"make one: {TOKENS_PAGE}")
    roles = {str(org["name"]): org.get("roleInOrg") for org in who.get("orgs", [])}
    if namespace != user and namespace not in roles:
        known = " or ".join(f"{name}/NAME" for name in (user, *sorted(roles)))
        refuse(
            f"--repo-id {repo_id}: {namespace} is neither {user} nor one of their organisations", known, "correct it"
        )
    if roles.get(namespace) == "read":
        refuse(f"{user} may read, and not write, in {namespace}", "a role there that may write", "ask who leads it")
    if access.get("role") == "fineGrained" and not _may_write(access.get("fineGrained", {}), repo_id):
        refuse(
            f"the fine-grained token of {user} may not write to {repo_id}",
            f"the permission repo.write for {namespace} or for {repo_id}",
            f"edit the token: {TOKENS_PAGE}",
        )


def _may_write(grants: Mapping[str, Any], repo_id: str) -> bool:
    if "repo.write" in grants.get("global", []):
        return True
    places = (repo_id, repo_id.partition("/")[0])
    scoped = [grant for grant in grants.get("scoped", []) if grant.get("entity", {}).get("name") in places]
    return any("repo.write" in grant.get("permissions", []) for grant in scoped)


@contextmanager
def explained(token: str, *, again: str | None = None) -> Iterator[None]:
    """Turns what the Hub refuses into the user's message, with the command that goes on from there."""
    go_on = f"; then: {again}" if again else ""
    try:
        yield
    except HubError as error:
        if again is None or error.__cause__ is None:
            raise
        raise HubError(
            error.seen, expected=error.expected, do=f"{error.do}; the local files are as they were. Then: {again}"
        ) from error
    except Exception as error:
        failure = find_failure(error)
        if failure is None and not isinstance(error, (ValueError, OSError, RuntimeError)):
            raise
        words = plain(error).replace(token, "***")
        if failure is None and not isinstance(error, ValueError):  # hf_xet's own words, or a local file's
            raise HubError(
                f"the push broke off: {type(error).__name__}: {words}",
                expected="answers that are the Hub's own, and local files that can be read",
                do=f"see its words, and whether a proxy answers in the Hub's place{go_on}",
            ) from error
        status = None if failure is None else failure.status
        reasons = {
            401: ("a token that the Hub knows", "hf auth login, or a new HF_TOKEN"),
            403: ("a token that may write there", f"a write token ({TOKENS_PAGE}), or another --repo-id"),
            404: ("a repository that the token may see", "correct --repo-id or --revision"),
            409: ("no other push at the same time", "wait for the other one"),
            412: ("no other push at the same time", "wait for the other one"),
        }
        expected, do = reasons.get(status or 0, ("files and a card that the Hub accepts", "see its words"))
        raise HubError(f"the Hub refuses: {words}", expected=expected, do=do + go_on) from error
