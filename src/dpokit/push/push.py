"""From a run folder to the Hub: what `dpokit push` does."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpokit.card.card import write_card
from dpokit.card.origin import Weights
from dpokit.console import say
from dpokit.errors import SettingsError
from dpokit.push.bundle import Parcel, build_parcel
from dpokit.push.choose_weights import What, choose
from dpokit.push.hub import Pushed, Target, push_parcel
from dpokit.push.permissions import check_repo_id
from dpokit.push.retry import Patience
from dpokit.rundir import RunDir

CARD_WORDS: dict[What, Weights] = {"merged": "model", "adapter": "adapter", "both": "both"}  # of what is sent


@dataclass(frozen=True)
class Outcome:
    """What was sent, or would be.

    Attributes:
        parcel: all that belongs there.
        target: where.
        pushed: None where nothing was sent.
    """

    parcel: Parcel
    target: Target
    pushed: Pushed | None

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return self.target.record() | self.parcel.record() | (self.pushed.record() if self.pushed else {})

    def describe(self) -> str:
        """The same for a reader."""
        return self.pushed.describe() if self.pushed else f"{self.target.describe()}\n{self.parcel.describe()}"


def push_run(
    folder: Path,
    target: Target,
    *,
    what: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
    yes: bool = False,
    patience: Patience | None = None,
) -> Outcome:
    """Sends a run with its card. One process alone calls it; with `yes` it waits for nobody.

    Args:
        folder: of the run.
        target: where to.
        what, base_model: as for `build_parcel`.
        license: the card is written anew with it; None takes the card that is there.
        dry_run: sends nothing, and asks neither the Hub nor for a token.
        yes: is the consent that is else asked for on the terminal.
        patience: with a Hub that fails for a while.

    Raises: DpokitError: what the user can mend.
    """
    check_repo_id(target.repo_id)
    run = RunDir(folder)
    if license is not None:
        weights = CARD_WORDS[choose(run, what)]
        write_card(run, license=license, repo_id=target.repo_id, base_model=base_model, weights=weights)
    parcel = build_parcel(run, what=what, base_model=base_model, repo_id=target.repo_id)
    if dry_run:
        return Outcome(parcel, target, None)
    say(f"{target.describe()}\n{parcel.describe()}")
    if not yes:
        _check_consent(f"send {len(parcel.files)} files to {target.repo_id}")
    return Outcome(parcel, target, push_parcel(parcel, target, patience=patience))


def _check_consent(what: str) -> None:
    """Raises SettingsError where the user, or nobody, says no."""
    do = "--yes to send it without a question, --dry-run to see it alone"
    if not sys.stdin.isatty():
        raise SettingsError(f"about to {what}, and there is no terminal to ask on", expected="consent", do=do)
    print(f"{what}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise SettingsError("nothing was sent: the answer was no", expected="consent", do=do)
