"""Checks the names of runs, models and files on a command line before anything heavy is imported. No torch."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from dpokit.errors import RunFolderError, SettingsError

MOST_NAMES = 5
RUNS = Path("runs")  # where recipes put their runs
RUN_FILES, MODEL_FILES = ("run.json",), ("run.json", "config.json", "adapter_config.json")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_run_name(name: str | Path) -> None:
    """Raises RunFolderError for a file, or a folder that does not exist; the message names the runs beside it."""
    path = Path(name)
    if not _exists(path):
        raise _refuse(path, "run", RUN_FILES)
    if not _is_folder(path):
        raise RunFolderError(f"{path} is a file", expected="a run folder", do="name the --output_dir of the run")


def check_run_or_model(name: str | None) -> None:
    """Raises RunFolderError for a path that does not exist; a name that may be a Hub id passes.

    `runs/smoll` counts as a path if there is a folder `runs`.
    """
    if name is None or _exists(path := Path(name)) or _exists(path.expanduser()):
        return
    if HUB_ID.fullmatch(name) and not name.startswith(".") and (len(path.parts) == 1 or not _is_folder(path.parent)):
        return
    raise _refuse(path, "run or model", MODEL_FILES)


def check_file_name(name: str | Path, flag: str) -> None:
    """Raises SettingsError for a file that does not exist; the message names the files of its kind beside it."""
    path = Path(name)
    if _exists(path):
        return
    others = [other for other in _list_folder(path.parent) if other.suffix == path.suffix and other.is_file()]
    raise SettingsError(
        f"{flag}: there is no such file: {path}",
        expected=_describe(path.parent, [other.name for other in others]),
        do=suggest(path.name, {other.name: str(other) for other in others}) or "correct the path",
    )


def suggest(name: str, choices: dict[str, str] | Iterable[str]) -> str:
    """`did you mean NAME?`, by the most similar of the choices; empty without one.

    Args:
        name: the name that does not exist.
        choices: the names that do; as a mapping, with the text to show for each.
    """
    shown = choices if isinstance(choices, dict) else {choice: choice for choice in choices}
    match = get_close_matches(name, shown, n=1)
    return f"did you mean {shown[match[0]]}?" if match else ""


def _refuse(path: Path, noun: str, files: tuple[str, ...]) -> RunFolderError:
    """The error about a folder that does not exist; it names others beside it, or else those in `runs`."""
    parent = path.parent if _find_folders(path.parent, files) or not _find_folders(RUNS, files) else RUNS
    others = _find_folders(parent, files)
    return RunFolderError(
        f"there is no such {noun}: {path}",
        expected=_describe(parent, [other.name for other in others]),
        do=suggest(path.name, {other.name: str(other) for other in others})
        or "name one that exists; a job that never started has no folder, and its log says why",
    )


def _describe(folder: Path, names: list[str]) -> str:
    if not _is_folder(folder):
        return f"a path that exists; there is no folder {folder}"
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    held = ", ".join(names[:MOST_NAMES]) + more if names else "none"
    return f"a path that exists; {'this folder' if folder == Path() else f'{folder}/'} holds {held}"


def _find_folders(parent: Path, files: tuple[str, ...]) -> list[Path]:
    return [path for path in _list_folder(parent) if any(_exists(path / file) for file in files)]


def _list_folder(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def _is_folder(path: Path) -> bool:
    return _exists(path) and path.is_dir()
