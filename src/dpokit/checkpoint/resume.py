"""May this run begin here, and from where? Decided before anything is loaded."""

from pathlib import Path

from dpokit.errors import RunFolderError, SettingsError, find_disk_trouble
from dpokit.rundir import RunDir
from dpokit.screen import say
from dpokit.settings import Settings

IDENTITY = ("model_name_or_path", "dataset_name")


def claim_folder(run: RunDir, settings: Settings) -> Path | None:
    """Makes the run folder this run's; the checkpoint to go on from, or None for a start from the beginning. Rank 0.

    A folder with an unfinished run of the same recipe, model and data is resumed. A finished one is touched only with
    `--resume_from_checkpoint auto|PATH` or `--overwrite_run`, a foreign one only with the latter.

    Raises:
        RunFolderError: the folder holds another or a finished run, or cannot be written.
        SettingsError: a resume path without a checkpoint, or flags that contradict each other.
    """
    asked = settings.training.resume_from_checkpoint
    if settings.data.overwrite_run and asked not in (None, "never"):
        raise SettingsError(
            f"overwrite_run deletes the run that resume_from_checkpoint {asked} would go on with",
            expected="one of the two",
            do="remove either flag",
        )
    try:
        run.make()
        if settings.data.overwrite_run:
            run.clear()
    except OSError as error:
        raise find_disk_trouble(error) or error from error
    _check_owner(run, settings)
    if asked not in (None, "auto", "never"):
        return _check_checkpoint(Path(asked))
    checkpoints = run.checkpoints()
    if run.read_run() is None or not checkpoints:
        if asked == "auto":
            say(f"{run.path} holds no checkpoint yet: starting from the beginning")
        return None
    say(f"resuming from {checkpoints[-1]}")
    return checkpoints[-1]


def _check_owner(run: RunDir, settings: Settings) -> None:
    record = run.read_run()
    asked = settings.training.resume_from_checkpoint
    remedy = "choose another --output_dir, or delete what is there with --overwrite_run true"
    if record is None:
        if run.own_files():
            raise RunFolderError(
                f"{run.path} holds {run.own_files()[0].name}, but no run.json: it is not a run of this toolkit",
                expected="an empty or a new folder",
                do=remedy,
            )
        return
    then = {name: record.get("settings", {}).get(name, {}).get("value") for name in IDENTITY}
    now = {"model_name_or_path": settings.model.model_name_or_path, "dataset_name": settings.data.dataset_name}
    if record.get("recipe") != settings.recipe or then != now:
        raise RunFolderError(
            f"{run.path} holds another run: recipe {record.get('recipe')}, model {then['model_name_or_path']}, "
            f"data {then['dataset_name']}",
            expected=f"recipe {settings.recipe}, model {now['model_name_or_path']}, data {now['dataset_name']}",
            do=remedy,
        )
    if record.get("state") == "finished" and asked in (None, "never"):
        raise RunFolderError(
            f"{run.path} holds a finished run",
            expected="an empty or a new folder",
            do=f"{remedy}; to train it further, add --resume_from_checkpoint auto and raise the number of steps",
        )
    if asked == "never":
        raise RunFolderError(
            f"{run.path} holds an unfinished run, and resume_from_checkpoint is never",
            expected="an empty or a new folder",
            do=f"{remedy}; or go on with it: --resume_from_checkpoint auto",
        )


def _check_checkpoint(path: Path) -> Path:
    if not (path / "trainer_state.json").is_file():
        raise SettingsError(
            f"--resume_from_checkpoint {path}: there is no checkpoint",
            expected="auto, never, or a checkpoint-N folder with trainer_state.json",
            do="correct the path",
        )
    return path
