"""What must not leave this machine with a model: tokens, local paths, user names. No torch."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub.constants import HF_TOKEN_PATH

from dpokit.credentials import find_secrets, read_secret_variables

# Forty hexadecimal digits are a key of Weights & Biases or the name of a commit; the words before the latter say so.
WANDB_KEY = re.compile(r"(?<![\w/@.-])[0-9a-f]{40}(?!\w)")
COMMIT = re.compile(r"(revision|commit|sha|hash|fingerprint|version)[^,;{}]{0,40}$", re.I)
URL = re.compile(r"\bhttps?://[^\s\"'<>()\[\]]+")
JSON_BREAK = re.compile(r"(?<!\\)\\[nrtbf]")  # a letter to a pattern, a blank to a reader
HOMES = re.compile(r"(?<![\w.])/(home|Users)/[\w.-]+|\b[A-Za-z]:(\\{1,2}|/)Users(\\{1,2}|/)[\w.-]+")
FILE_URL = re.compile(r"\bfile:/+[\w~.][^\s\"'<>]*")
# A value of a configuration that is a path and nothing else: of this machine or, where it was copied from, of another.
VALUE = re.compile(r'(?<=")((/[\w.+@-]+){2,}/?|~/[^\s"]+|\\\\\\\\[\w.$-]+\\\\[^"]+|[A-Za-z]:(\\\\|/)[^"]+)(?=")')
ABSOLUTE = re.compile(r"(?<![\w.])/[\w.+-]+(/[\w.@+-]+)+")
OF_EVERY_MACHINE = {"usr", "bin", "dev", "etc", "proc", "sys", "lib"}


class LeakFinder:
    """Searches what is to be sent.

    Args:
        folders: of this machine, beside the home and the working directory, of which nothing may be said.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        named = [Path.home(), Path.cwd(), *folders]
        self._folders = sorted({form for path in named for form in (path.absolute(), path.resolve())} - {Path("/")})
        self._own = [_find_text(path) for path in self._folders]
        self._stored = _read_stored_token()
        names = {Path.home().name, os.environ.get("USER"), os.environ.get("LOGNAME")}
        self._users = names - {"root", "", None}

    def in_text(self, text: str) -> Iterator[tuple[int, str]]:
        """Line (from 1) and what stands there, in a card or in JSON. A token is named by its kind and never shown."""
        for number, line in enumerate(text.splitlines(), 1):
            yield from ((number, kind) for kind in find_secrets(line))
            if any(not COMMIT.search(line[: like.start()]) for like in WANDB_KEY.finditer(line)):
                yield number, "a Weights & Biases key"
            if self._stored and self._stored in line:
                yield number, "the value of the Hub's token"
            line = JSON_BREAK.sub("  ", URL.sub("", line))
            paths = [found[0] for pattern in (HOMES, FILE_URL, *self._own) if (found := pattern.search(line))]
            paths += [found[0] for found in ABSOLUTE.finditer(line) if self._is_of_here(Path(found[0].rstrip(".")))]
            if paths:
                yield number, f"the local path {max(paths, key=len)}"

    def in_json(self, text: str) -> Iterator[tuple[int, str]]:
        """As `in_text`, and any path that is a whole value, wherever it may be one."""
        told = list(self.in_text(text))
        yield from told
        known = {number for number, _ in told}
        for number, line in enumerate(text.splitlines(), 1):
            if number not in known and (path := VALUE.search(line)):
                yield number, f"the local path {path[0]}"

    def in_bytes(self, content: bytes) -> Iterator[str]:
        """This machine's own secrets and folders, in a file that is no prose.

        A vocabulary holds what the texts of the world hold, `/root` among it, so nothing else is searched for.
        """
        secrets = {**dict(read_secret_variables()), "the Hub's token": self._stored}
        yield from (f"the value of {name}" for name, secret in secrets.items() if secret and secret.encode() in content)
        for path in self._folders:
            if len(path.parts) > 2 and re.search(re.escape(str(path).encode()) + rb"(?![\w-])", content):
                yield f"the local path {path}"

    def _is_of_here(self, path: Path) -> bool:
        """Whether an absolute path in a text is one of this machine, or holds its user's name."""
        if path.parts[1] in OF_EVERY_MACHINE:
            return False
        return bool(self._users & set(path.parts)) or _exists(path) or (len(path.parts) > 3 and _exists(path.parent))


def _read_stored_token() -> str | None:
    stored = Path(HF_TOKEN_PATH)  # read as it is: huggingface_hub would renew a token that ages, by a request
    return stored.read_text().strip() or None if stored.is_file() else None


def _find_text(path: Path) -> re.Pattern[str]:
    """The path as it stands in text or, its letters escaped, in JSON."""
    forms = sorted({str(path), json.dumps(str(path))[1:-1]})
    return re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, forms))})(?![\w-])[^\s\"']*")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than any file's, a folder that may not be read
        return False
