"""Which of a run's weights are sent: the whole model, its adapter, or both. No torch."""

from typing import Literal

from dpokit.card.front_matter import is_on_disk
from dpokit.errors import HubError, SettingsError
from dpokit.rundir import RunDir

What = Literal["merged", "adapter", "both"]
WHATS = {"merged": "the whole model", "adapter": "the adapter", "both": "the whole model and its adapter"}


def choose(run: RunDir, what: str | None) -> What:
    """What is sent of a run: what was asked for; else the whole model, where there is one, or the adapter.

    Raises:
        SettingsError: something that this run does not have.
        HubError: weights of an earlier end, or none.
    """
    if what is not None and what not in WHATS:
        raise SettingsError(
            f"--what {what} is nothing that can be pushed", expected=" or ".join(WHATS), do="correct it"
        )
    whole, adapter = run.merged.is_dir() or run.model.is_dir(), run.adapter.is_dir()
    weights, state = run.find_weights(), (run.read_run() or {}).get("state")
    if not whole and not adapter:
        raise HubError(
            f"{run.path} holds no final weights (merged/, model/ or adapter/)",
            expected="the folder of a run that is finished",
            do="train the run to its end, or correct the path",
        )
    if weights is not None and state not in (None, "finished"):  # without them merged/ is of a checkpoint, as asked for
        raise HubError(
            f"the run in {run.path} is {state}: {weights.name}/ is of an earlier end",
            expected="a run that is finished",
            do="let it finish",
        )
    if weights is not None and run.is_merge_old() and what != "adapter":
        raise HubError(
            f"{run.merged} is of an earlier end: the run was trained on since",
            expected="a merge of what it ended with",
            do=f"delete {run.merged} and run dpokit merge {run.path}" + ("; or --what adapter" if adapter else ""),
        )
    if what in ("merged", "both") and not whole:
        raise SettingsError(
            f"--what {what}, and {run.path} holds an adapter that is not merged",
            expected="a whole model: merged/ or model/",
            do=f"dpokit merge {run.path}; or --what adapter",
        )
    if what in ("adapter", "both") and not adapter:
        raise SettingsError(
            f"--what {what}, and {run.path} has no adapter: the whole model was trained",
            expected="--what merged",
            do="leave --what out",
        )
    if what is not None:
        return "merged" if what == "merged" else "adapter" if what == "adapter" else "both"
    return "merged" if whole else "adapter"


def check_base_model(what: What, base_model: str | None) -> None:
    """Raises SettingsError for a base that would have no effect, or that nobody else could load."""
    if base_model is None:
        return
    if what == "merged":
        raise SettingsError(
            f"--base-model {base_model} would have no effect: no adapter is sent",
            expected="--base-model with --what adapter or both",
            do="leave --base-model out",
        )
    if is_on_disk(base_model):
        raise SettingsError(
            f"--base-model {base_model} is a local folder, or no name at all",
            expected="the base's id on the Hub: USER/NAME",
            do="correct --base-model",
        )
