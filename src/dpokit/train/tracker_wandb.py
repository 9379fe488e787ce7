"""A run in Weights & Biases: online with an account, else in files beside the run; never a dead run."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers.integrations import WandbCallback

from dpokit.console import say
from dpokit.credentials import SECRET_SETTING
from dpokit.rundir import RunDir
from dpokit.settings.load import Settings

HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # under which `wandb login` puts keys into ~/.netrc
# Our line instead of wandb's many. And no waiting for ever on a server, as wandb would at a run's end, while GPUs idle.
# The user's own WANDB_SILENT, WANDB_INIT_TIMEOUT, WANDB_FINISH_TIMEOUT win.
SETTINGS = {"silent": True, "init_timeout": 20.0, "finish_timeout": 300.0}


class Wandb(WandbCallback):
    """transformers' callback, logging into a W&B run that is opened here, with its files in the run folder."""

    def __init__(self, run: RunDir, settings: Settings, after_step: int) -> None:
        import wandb

        super().__init__()
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # wandb's telemetry, complaining about its server
        first_mode, why = find_mode()
        arguments: dict[str, Any] = {
            "project": settings.training.project,
            "name": settings.training.run_name,
            "group": settings.data.run_group,
            "tags": settings.data.run_tags,
            "config": settings.values(),
            "dir": os.environ.get("WANDB_DIR") or str(run.path),
            "settings": {k: v for k, v in SETTINGS.items() if f"WANDB_{k.upper()}" not in os.environ},
        }
        known = (run.read_run() or {}).get("wandb_id")
        with _without_secrets(settings):
            for mode in dict.fromkeys((first_mode, "offline", "disabled")):
                # An offline run cannot be gone on with: each start is one of its own, of the same name and group.
                go_on = {"id": known, "resume": "allow"} if known and mode == "online" else {}
                try:
                    self.run: Any = wandb.init(mode=mode, **arguments, **go_on)
                    break
                except Exception as error:  # a key that is refused, a server out of reach
                    why = first_line(error)
        if mode == "online":
            run.write_run(wandb_id=self.run.id)
            say(f"wandb: {self.run.url}")
        elif mode == "offline":
            say(f"wandb: {why}: tracked offline; `wandb sync {Path(self.run.dir).parent}` uploads it")
        else:
            say(f"wandb: {why}: not tracked there")

    def finish(self, final: dict[str, Any]) -> None:
        self.run.summary.update(final)
        if final["final/state"] == "preempted":
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if final["final/state"] == "finished" else 1)


def find_mode() -> tuple[Any, str]:
    """online, offline or disabled, and why."""
    import wandb

    if is_switched_off():
        return "disabled", "switched off by WANDB_MODE or WANDB_DISABLED"
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return "offline", "WANDB_MODE is offline"
    if has_key() or wandb.login(prompt=False, verify=False):
        return "online", ""
    # Without a key and without a terminal, wandb would end the whole run.
    return "offline", "no API key found (`wandb login` keeps one)"


def is_switched_off() -> bool:
    return os.environ.get("WANDB_MODE") == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true")


def has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    hosts = {urlsplit(server).netloc} if server else set(HOSTS)
    try:
        return not hosts.isdisjoint(netrc(os.environ.get("NETRC") or Path.home() / ".netrc").hosts)
    except (OSError, NetrcParseError):
        return False


@contextmanager
def _without_secrets(settings: Settings) -> Iterator[None]:
    """Hides them on the command line meanwhile: wandb keeps a copy of it with the run."""
    words = sys.argv
    values = {**vars(settings.data), **vars(settings.training), **vars(settings.model)}
    secrets = [str(value) for name, value in values.items() if name.endswith(SECRET_SETTING) and value]
    sys.argv = ["***" if any(secret in word for secret in secrets) else word for word in words]
    try:
        yield
    finally:
        sys.argv = words


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
