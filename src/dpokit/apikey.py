"""URL and API key of an OpenAI-compatible endpoint; the key is never shown. No torch."""

import os

import httpx

from dpokit.errors import SettingsError


class ApiKey:
    """A secret from the environment; its repr and str are masked.

    Attributes:
        variable: the name of the environment variable it comes from.
    """

    def __init__(self, variable: str, secret: str = "") -> None:
        self.variable = variable
        self._secret = secret.strip()
        # A header cannot hold such a character, and the HTTP client's own error message would show the key.
        if not self._secret.isascii() or not self._secret.isprintable() or " " in self._secret:
            raise SettingsError(
                f"the key in {variable} holds a character that no key has (a space, a newline, or beyond ASCII)",
                expected="the key alone",
                do=f"set {variable} again",
            )

    def __bool__(self) -> bool:
        return bool(self._secret)

    def __repr__(self) -> str:
        return f"ApiKey({self.variable}, {'***' if self else 'not set'})"

    def headers(self) -> dict[str, str]:
        """The Authorization header; empty without a key, which a local server does not need."""
        return {"Authorization": f"Bearer {self._secret}"} if self else {}

    def hide(self, text: str) -> str:
        """The text with `***` in place of the key, which a server may have repeated."""
        return text.replace(self._secret, "***") if self else text


def read_api_key(variable: str = "OPENAI_API_KEY") -> ApiKey:
    """The key in an environment variable; an empty one if it is not set.

    Raises: SettingsError for a key that a header cannot hold; the message does not show the key.
    """
    return ApiKey(variable, os.environ.get(variable, ""))


def check_url(url: str) -> str:
    """The endpoint's URL without `/chat/completions`. Raises: SettingsError if it is malformed or may hold a secret."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        parts = httpx.URL("")
    if parts.scheme not in ("http", "https") or not parts.host or parts.userinfo or parts.query:
        # The message does not show the URL, which may hold a password or a key.
        raise SettingsError(
            "the endpoint's URL is not http(s)://HOST/PATH, or holds a user, a password or a query",
            expected="a URL like https://api.openai.com/v1; the key comes from an environment variable",
            do="correct the URL",
        )
    return url.rstrip("/").removesuffix("/chat/completions")
