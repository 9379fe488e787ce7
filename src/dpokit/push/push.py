"""Pushes a run folder to the Hub: the work of `dpokit push`."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpokit.card.card import read_publisher, write_card
from dpokit.console import say
from dpokit.errors import SettingsError
from dpokit.push.bundle import Bundle, build_bundle
from dpokit.push.choose_weights import check_base_model, choose_weights
from dpokit.push.hub import Pushed, PushTarget, push_bundle
from dpokit.push.permissions import check_repo_id
from dpokit.push.retry import RetryPolicy
from dpokit.rundir import RunDir


@dataclass(frozen=True)
class Outcome:
    """The result of a push or a dry run.

    Attributes:
        bundle: all files of the push.
        target: the repository.
        pushed: the upload's result; None for a dry run.
    """

    bundle: Bundle
    target: PushTarget
    pushed: Pushed | None

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return self.target.record() | self.bundle.record() | (self.pushed.record() if self.pushed else {})

    def describe(self) -> str:
        """The record as text."""
        return self.pushed.describe() if self.pushed else f"{self.target.describe()}\n{self.bundle.describe()}"


def push_run(
    folder: Path,
    target: PushTarget,
    *,
    weights: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
    yes: bool = False,
    retry: RetryPolicy | None = None,
) -> Outcome:
    """Sends a run and its card to the Hub. Only one process calls it.

    Args:
        folder: the run folder.
        target: the repository.
        weights, base_model: as for `build_bundle`.
        license: writes the card again with this licence and, if dpokit wrote the present card, with its language,
            base model, contact and evaluation; None keeps that card.
        dry_run: send nothing, contact no server and need no token.
        yes: send without asking on the terminal.
        retry: how often and how long failed requests are repeated.

    Raises: DpokitError: an error that the user can correct.
    """
    check_repo_id(target.repo_id)
    run = RunDir(folder)
    if license is not None:
        published = choose_weights(run, weights)
        check_base_model(published, base_model, writes_card=True)
        publisher = read_publisher(run)
        publisher = replace(publisher, repo_id=target.repo_id, base_model=base_model or publisher.base_model)
        if license != "other":
            publisher = replace(publisher, license_name=None, license_link=None)
        facts = vars(replace(publisher, license=license))
        write_card(run, **facts, weights=published)
        base_model = None if published == "model" else base_model  # only the card names it
    bundle = build_bundle(run, weights=weights, base_model=base_model, repo_id=target.repo_id)
    if dry_run:
        return Outcome(bundle, target, None)
    say(f"{target.describe()}\n{bundle.describe()}")
    if not yes:
        _check_consent(f"send {len(bundle.files)} files to {target.repo_id}")
    return Outcome(bundle, target, push_bundle(bundle, target, retry=retry))


def _check_consent(action: str) -> None:
    """Raises SettingsError if the user refuses, or if there is no terminal to ask on."""
    do = "--yes to send without a question, --dry-run to only list the files"
    if not sys.stdin.isatty():
        raise SettingsError(f"about to {action}, but there is no terminal to ask on", expected="consent", do=do)
    print(f"{action}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise SettingsError("nothing was sent: the answer was no", expected="consent", do=do)
