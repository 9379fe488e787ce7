"""The folder of dpokit's caches. No torch."""

import os
from pathlib import Path


def find_caches() -> Path:
    """The folder of dpokit's caches: `DPOKIT_CACHE`, else `dpokit` among the user's caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DPOKIT_CACHE") or Path(caches) / "dpokit")
