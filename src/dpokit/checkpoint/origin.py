"""Whether this machine's user wrote a checkpoint: a signature in its manifest, by a key that never leaves the home.

The key lies in `DPOKIT_STATE`, else in `XDG_STATE_HOME/dpokit` or `~/.local/state/dpokit`; nodes that share a home
share it. No torch.
"""

import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

KEY_BYTES = 32


def find_key_file() -> Path:
    """Where the key of this machine's user is kept."""
    given = os.environ.get("DPOKIT_STATE")
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return (Path(given) if given else state / "dpokit") / "key"


def sign(digest: str) -> str | None:
    """The signature of a manifest's sha256; None where no key can be kept."""
    key = _read_key() or _make_key()
    return None if key is None else _compute(key, digest)


def is_signed_here(digest: str, signature: object) -> bool:
    """Whether `sign` of this user made the signature."""
    key = _read_key()
    return key is not None and isinstance(signature, str) and hmac.compare_digest(_compute(key, digest), signature)


def _compute(key: bytes, digest: str) -> str:
    return hmac.digest(key, digest.encode(), "sha256").hex()


def _read_key() -> bytes | None:
    try:
        key = find_key_file().read_bytes()
    except OSError:
        return None
    return key if len(key) == KEY_BYTES else None


def _make_key() -> bytes | None:
    """A new key, or the one that another process has made meanwhile."""
    file = find_key_file()
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as content:
            content.write(secrets.token_bytes(KEY_BYTES))
        with suppress(FileExistsError):
            os.link(part, file)  # unlike a rename it replaces no other key
        part.unlink()
    except OSError:
        return None
    return _read_key()
