"""Finds secrets in texts and masks them. No torch.

No function shows a secret: each secret is reported by its kind.
"""

import os
import re
from collections.abc import Iterator

# Endings of the names of settings whose value is a secret.
SECRET_SETTING = ("token", "api_key", "password")
# Endings of the names of environment variables whose value is a secret.
SECRET_VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$", re.I)
MIN_SECRET_LETTERS = 16  # a shorter value of such a variable is an ordinary word ("disabled")

TOKENS = {
    "a Hugging Face token": re.compile(r"\b(hf|hf_oauth|api_org)_[A-Za-z0-9]{20,}"),
    "an API key": re.compile(r"\bsk-(?=[A-Za-z_-]{0,200}\d)[\w-]{20,}"),
    "a Weights & Biases key": re.compile(r"\bwandb_v\d_\w{20,}"),
    "a GitHub token": re.compile(r"\b(gh[pousr]_|github_pat_)\w{20,}"),
    "a Slack token": re.compile(r"\bxox[abeoprs]-(?=[A-Za-z-]{0,200}\d)[A-Za-z0-9-]{10,}"),
    "a Google API key": re.compile(r"\bAIza[\w-]{35}(?![\w-])"),
    "an AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a line of a .netrc": re.compile(r"\bmachine\s+\S+\s+login\s+\S+\s+password\s+\S+"),
    "a private key": re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----|\bPuTTY-User-Key-File-\d"),
}
# The user part of a URL, before its host: a secret in every http URL, and in other URLs if it has a password.
_USER = re.compile(r"(?<![\w+.-])(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<secret>[^\s/?#\"'<>]+)@", re.I)
_PARAMETER = re.compile(
    r"[?&#;](?:[\w.%-]*[-_.])?(?:access|api|auth|account|shared|aws)*[-_]?"
    r"(?:tokens?|keys?|key_?id|secret|password|passwd|pwd|sig|signature|auth|credentials?|jwt)=(?P<secret>[^\s&#\"'<>]+)",
    re.I,
)
HIDDEN = "***"


def find_secrets(text: str) -> list[str]:
    """The kinds of all secrets in the text, in their order."""
    return [kind for _, _, kind in _find_secrets(text)]


def hide_secrets(text: str) -> str:
    """The text with `***` for each secret in it."""
    for begin, end, _ in reversed(list(_find_secrets(text))):
        text = text[:begin] + HIDDEN + text[end:]
    return text


def read_secret_variables() -> Iterator[tuple[str, str]]:
    """Name and value of each environment variable that holds a secret."""
    for name, value in os.environ.items():
        if SECRET_VARIABLE.search(name) and len(value) >= MIN_SECRET_LETTERS:
            yield name, value


def _find_secrets(text: str) -> Iterator[tuple[int, int, str]]:
    """Begin, end and kind of each secret; the ranges do not overlap."""
    taken = 0
    for begin, end, kind in sorted(_find_all(text)):
        if begin >= taken:
            yield begin, end, kind
            taken = end


def _find_all(text: str) -> Iterator[tuple[int, int, str]]:
    for kind, token in TOKENS.items():
        yield from ((match.start(), match.end(), kind) for match in token.finditer(text))
    for match in _USER.finditer(text):
        if match["scheme"].lower() in ("http", "https") or re.search(":|%3a", match["secret"], re.I):
            yield match.start("secret"), match.end("secret"), "a URL with a user or a password"
    for match in _PARAMETER.finditer(text):
        yield match.start("secret"), match.end("secret"), "a URL with a secret among its parameters"
    for name, value in read_secret_variables():
        for match in re.finditer(re.escape(value), text):
            yield match.start(), match.end(), f"the value of {name}"
