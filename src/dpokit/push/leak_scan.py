"""Finds secrets, local paths and user names in files that are to be published. No torch."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub.constants import HF_TOKEN_PATH

from dpokit.credentials import find_secrets, read_secret_variables

# Forty hexadecimal digits are a key of Weights & Biases or a commit hash, which a word of COMMIT precedes.
WANDB_KEY = re.compile(r"(?<![\w/@.-])[0-9a-f]{40}(?!\w)")
COMMIT = re.compile(r"(revision|commit|sha|hash|fingerprint|version)[^,;{}]{0,40}$", re.I)
URL = re.compile(r"\bhttps?://[^\s\"'<>()\[\]]+")
JSON_BREAK = re.compile(
    r"(?<!\\)\\[nrtbf]"
)  # an escaped control character: white space to a reader, a letter to a pattern
HOMES = re.compile(r"(?<![\w.])/(home|Users)/[\w.-]+|\b[A-Za-z]:(\\{1,2}|/)Users(\\{1,2}|/)[\w.-]+")
FILE_URL = re.compile(r"\bfile:/+[\w~.][^\s\"'<>]*")
# A JSON value that is only a path, of this machine or of another one that the file was copied from.
VALUE = re.compile(r'(?<=")((/[\w.+@-]+){2,}/?|~/[^\s"]+|\\\\\\\\[\w.$-]+\\\\[^"]+|[A-Za-z]:(\\\\|/)[^"]+)(?=")')
ABSOLUTE = re.compile(r"(?<![\w.])/[\w.+-]+(/[\w.@+-]+)+")
SYSTEM_FOLDERS = {"usr", "bin", "dev", "etc", "proc", "sys", "lib"}


class LeakFinder:
    """Searches the contents of files for secrets and local paths.

    Args:
        folders: local folders whose paths must not be published, beside the home and the working directory.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        private = [Path.home(), Path.cwd(), *folders]
        self._folders = sorted({form for path in private for form in (path.absolute(), path.resolve())} - {Path("/")})
        self._folder_patterns = [_compile_path(path) for path in self._folders]
        self._stored_token = _read_stored_token()
        names = {Path.home().name, os.environ.get("USER"), os.environ.get("LOGNAME")}
        self._users = names - {"root", "", None}

    def search_text(self, text: str) -> Iterator[tuple[int, str]]:
        """Yields (line number from 1, description) of each leak in a card or in JSON. Never shows a secret itself."""
        for number, line in enumerate(text.splitlines(), 1):
            yield from ((number, kind) for kind in find_secrets(line))
            if any(not COMMIT.search(line[: like.start()]) for like in WANDB_KEY.finditer(line)):
                yield number, "a Weights & Biases key"
            if self._stored_token and self._stored_token in line:
                yield number, "the value of the Hub's token"
            line = JSON_BREAK.sub("  ", URL.sub("", line))
            paths = [
                match[0] for pattern in (HOMES, FILE_URL, *self._folder_patterns) if (match := pattern.search(line))
            ]
            paths += [match[0] for match in ABSOLUTE.finditer(line) if self._is_local(Path(match[0].rstrip(".")))]
            if paths:
                yield number, f"the local path {max(paths, key=len)}"

    def search_json(self, text: str) -> Iterator[tuple[int, str]]:
        """As `search_text`; also finds every value that is only a path, of whatever machine."""
        leaks = list(self.search_text(text))
        yield from leaks
        reported = {number for number, _ in leaks}
        for number, line in enumerate(text.splitlines(), 1):
            if number not in reported and (path := VALUE.search(line)):
                yield number, f"the local path {path[0]}"

    def search_bytes(self, content: bytes) -> Iterator[str]:
        """Yields a description of each of this machine's secrets and folders that a vocabulary file holds.

        Searches for nothing else: a vocabulary may well hold `/root`, or words that look like a secret.
        """
        secrets = {**dict(read_secret_variables()), "the Hub's token": self._stored_token}
        yield from (f"the value of {name}" for name, secret in secrets.items() if secret and secret.encode() in content)
        for path in self._folders:
            if len(path.parts) > 2 and re.search(re.escape(str(path).encode()) + rb"(?![\w-])", content):
                yield f"the local path {path}"

    def _is_local(self, path: Path) -> bool:
        """Whether an absolute path exists on this machine, or holds the user's name."""
        if path.parts[1] in SYSTEM_FOLDERS:
            return False
        return bool(self._users & set(path.parts)) or _exists(path) or (len(path.parts) > 3 and _exists(path.parent))


def _read_stored_token() -> str | None:
    stored = Path(HF_TOKEN_PATH)  # not by huggingface_hub, which may send a request to renew an old token
    return stored.read_text().strip() or None if stored.is_file() else None


def _compile_path(path: Path) -> re.Pattern[str]:
    """A pattern for the path as text, and with the escapes of JSON."""
    forms = sorted({str(path), json.dumps(str(path))[1:-1]})
    return re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, forms))})(?![\w-])[^\s\"']*")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or a folder without permission to read
        return False
