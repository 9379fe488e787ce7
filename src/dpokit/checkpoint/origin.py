"""Signs checkpoints with a key of this user, and tells whether this user wrote a checkpoint.

The key never leaves its folder: `DPOKIT_STATE`, else `XDG_STATE_HOME/dpokit` or `~/.local/state/dpokit`. Nodes that
share a home folder share the key. Imports no torch.
"""

import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

KEY_BYTES = 32


def find_key_file() -> Path:
    """The file that holds this user's key."""
    folder = os.environ.get("DPOKIT_STATE")
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return (Path(folder) if folder else state / "dpokit") / "key"


def sign_checkpoint(digest: str) -> str | None:
    """The signature of a manifest's sha256; None if no key can be written."""
    key = _read_key() or _make_key()
    return None if key is None else _compute(key, digest)


def is_signed_here(digest: str, signature: object) -> bool:
    """Whether the signature was made with this user's key."""
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
    """A new key, or the one that another process has written in the meantime; None if the folder is not writable."""
    file = find_key_file()
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as content:
            content.write(secrets.token_bytes(KEY_BYTES))
        with suppress(FileExistsError):
            os.link(part, file)  # unlike a rename, this replaces no existing key
        part.unlink()
    except OSError:
        return None
    return _read_key()
