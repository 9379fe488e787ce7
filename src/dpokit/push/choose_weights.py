"""The weights of a run that are sent: the whole model, its adapter, or both. No torch."""

from dpokit.card.front_matter import is_on_disk
from dpokit.card.origin import Weights
from dpokit.errors import HubError, SettingsError
from dpokit.rundir import RunDir

WEIGHTS: dict[Weights, str] = {
    "model": "the whole model",
    "adapter": "the adapter",
    "both": "the whole model and its adapter",
}


def choose_weights(run: RunDir, weights: str | None) -> Weights:
    """Returns the weights to send: those of --weights if set; else the whole model if there is one, or the adapter.

    Raises:
        SettingsError: the run does not have these weights.
        HubError: the run has no weights, or they are older than its last training.
    """
    if weights is not None and weights not in WEIGHTS:
        raise SettingsError(f"--weights {weights} is unknown", expected=" or ".join(WEIGHTS), do="correct --weights")
    whole, adapter = run.merged.is_dir() or run.model.is_dir(), run.adapter.is_dir()
    final, state = run.find_weights(), (run.read_run() or {}).get("state")
    if not whole and not adapter:
        raise HubError(
            f"{run.path} holds no final weights (merged/, model/ or adapter/)",
            expected="the folder of a finished run",
            do="train the run to its end, or correct the path",
        )
    if final is not None and state not in (None, "finished"):  # without final weights, merged/ is of a checkpoint
        raise HubError(
            f"the run in {run.path} is {state}: {final.name}/ is older than this training",
            expected="a finished run",
            do="let it finish",
        )
    if final is not None and run.is_merge_old() and weights != "adapter":
        raise HubError(
            f"{run.merged} is out of date: the run was trained further after the merge",
            expected="a merge of the final weights",
            do=f"delete {run.merged} and run dpokit merge {run.path}" + ("; or --weights adapter" if adapter else ""),
        )
    if weights in ("model", "both") and not whole:
        raise SettingsError(
            f"--weights {weights}, but {run.path} holds an adapter that is not merged",
            expected="a whole model: merged/ or model/",
            do=f"dpokit merge {run.path}; or --weights adapter",
        )
    if weights in ("adapter", "both") and not adapter:
        raise SettingsError(
            f"--weights {weights}, but {run.path} has no adapter: the whole model was trained",
            expected="--weights model",
            do="leave --weights out",
        )
    if weights is None:
        return "model" if whole else "adapter"
    return next(name for name in WEIGHTS if name == weights)


def check_base_model(weights: Weights, base_model: str | None, *, writes_card: bool = False) -> None:
    """Raises SettingsError for a base model that has no effect, or that others cannot load."""
    if base_model is None:
        return
    if weights == "model" and not writes_card:
        raise SettingsError(
            f"--base-model {base_model} has no effect: no adapter is sent, and the card is kept",
            expected="--base-model with --weights adapter or both, or with --license, which writes the card again",
            do="leave --base-model out, or add --license",
        )
    if is_on_disk(base_model):
        raise SettingsError(
            f"--base-model {base_model} is a local folder, or no valid Hub id",
            expected="the base's id on the Hub: USER/NAME",
            do="correct --base-model",
        )
