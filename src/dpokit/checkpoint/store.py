"""Checkpoints that verify: written under another name, listed in a manifest, renamed when all is on disk. No torch.

    .checkpoint-N.TOKEN.part/   being written by the start of the run that TOKEN stands for
    .checkpoint-N.replaced/     the former checkpoint-N, for the moment in which a new one takes its name
    checkpoint-N/               whole where manifest.json, written last, holds true: sizes and sha256 of all its files,
                                and its own

A folder whose manifest does not hold true is never resumed from and never counted; the next whole one replaces it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from dpokit.checkpoint.origin import find_key_file, is_signed_here, sign
from dpokit.checkpoint.pickles import find_pickle_trouble, needs_trust
from dpokit.errors import RunFolderError
from dpokit.rundir import RunDir, read_record, remove_tree, sync_folder, write_json

FORMAT = 1  # of the manifest; a folder of a later one is left alone
MANIFEST = "manifest.json"
REPLACED = ".replaced"
Files = dict[str, dict[str, Any]]
MOST_PROCESSES = 100_000
NUMBER = (int, float)
# What a resume reads in these files, by its types.
TRAINER_STATE: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("global_step", "max_steps"), (int,)),
    "log_history": (list,),
    "best_global_step": (int, type(None)),
}
PROGRESS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("loss", "tokens", "logged_loss"), NUMBER),
    **dict.fromkeys(("logged_step", "first_step"), (int,)),
    **dict.fromkeys(("sums", "last_update"), (dict,)),
    **dict.fromkeys(("log_due", "evaluation_due"), (bool,)),
    "working_seconds": (*NUMBER, type(None)),
}


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint-N folder, compared with its manifest.

    Attributes:
        manifest: `{format, step, world_size, placement, settings, weights_alone, files, sha256, signature}`; None if
            there is none that can be read.
        problem: why nothing may be loaded from it; None if it is whole: all files are as its manifest lists them.
        is_unreadable: the disk returned an error, so the folder's content is unknown.
    """

    path: Path
    step: int
    manifest: dict[str, Any] | None
    problem: str | None
    is_unreadable: bool = False

    @property
    def resume_problem(self) -> str | None:
        """Why a run cannot resume from it: its problem, or that it was saved with weights alone; None if it can."""
        return (self.manifest or {}).get("weights_alone") if self.problem is None else self.problem

    @property
    def is_of_newer_version(self) -> bool:
        """Whether a later version of dpokit wrote it."""
        return self.problem is not None and "newer version" in self.problem


def find_checkpoints(run: RunDir, *, deep: bool) -> list[Checkpoint]:
    """All checkpoints of a run, newest first.

    `deep` reads every byte and searches every pickle; otherwise names and sizes are compared.
    """
    return [check_checkpoint(path, deep=deep) for path in reversed(run.checkpoints())]


def check_checkpoint(path: Path, *, deep: bool) -> Checkpoint:
    """A checkpoint-N folder, compared with its manifest; `deep` as for `find_checkpoints`."""
    step = int(path.name.rpartition("-")[2])
    try:
        manifest = read_record(path / MANIFEST)
        problem = _find_problem(path, step, manifest, deep=deep)
    except FileNotFoundError:
        return Checkpoint(path, step, None, "it has no manifest: it was not finished, or not written by dpokit")
    except OSError as error:
        return Checkpoint(path, step, None, f"it cannot be read ({error.strerror})", is_unreadable=True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Checkpoint(path, step, None, f"its manifest cannot be read ({type(error).__name__})")
    return Checkpoint(path, step, manifest, problem)


def _find_problem(path: Path, step: int, manifest: Mapping[str, Any], *, deep: bool) -> str | None:
    if manifest["sha256"] != _digest_manifest(manifest):
        return "its manifest is not what was written (its sha256 differs)"
    if manifest["format"] > FORMAT:
        return f"it was written by a newer version (format {manifest['format']}, known: {FORMAT})"
    if manifest["step"] != step:
        return f"its manifest is that of step {manifest['step']}"
    files: Files = manifest["files"]
    for name, entry in sorted(files.items()):
        file = path / name
        if not _is_inside(name):
            return f"its manifest names {name}, which is no file of the folder"
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            return f"{name} is missing"
        if size != entry["size"]:
            return f"{name} has {size:,} bytes, not {entry['size']:,}"
    for name, entry in sorted(files.items()) if deep else ():
        if _hash(path / name) != entry["sha256"]:
            return f"{name} is not what was written (its sha256 differs)"
    if deep and (hostile := find_pickle_trouble(path)) is not None:
        return f"it must not be loaded: {hostile}"
    return _find_missing_state(path, step, manifest) if deep and manifest.get("weights_alone") is None else None


def _find_missing_state(path: Path, step: int, manifest: Mapping[str, Any]) -> str | None:
    """What of a run's state neither the manifest nor the folder has: a resume would begin it anew without a word."""
    names, processes = list(manifest["files"]), manifest["world_size"]
    if type(processes) is not int or not 1 <= processes <= MOST_PROCESSES:
        return f"its manifest is of {processes} processes"
    random_state = "rng_state.pth" if processes == 1 else "rng_state_{}.pth"
    needed = {
        "trainer state": ["trainer_state.json"],
        "learning rate schedule": ["scheduler.pt"],
        "optimizer": ["optimizer.pt", "optimizer_*/.metadata", "global_step*/*_optim_states.pt"],
        **{f"random state of rank {rank}": [random_state.format(rank)] for rank in range(processes)},
        **{f"progress of rank {rank}": [f"progress_{rank}.json"] for rank in range(processes)},
    }
    for what, patterns in needed.items():
        if not any(fnmatch(name, pattern) for pattern in patterns for name in names):
            return f"it has no {what} ({patterns[0]})"
    typed = {"trainer_state.json": TRAINER_STATE}
    typed |= {f"progress_{rank}.json": PROGRESS for rank in range(processes)}
    for name, known in typed.items():
        if (problem := _find_type_problem(path / name, known)) is not None:
            return f"{name} {problem}"
    reached = read_record(path / "trainer_state.json")["global_step"]
    return None if reached == step else f"trainer_state.json is of step {reached}"


def _find_type_problem(file: Path, known: Mapping[str, tuple[type, ...]]) -> str | None:
    try:
        values = read_record(file)
    except (ValueError, RecursionError) as error:
        return f"cannot be read ({type(error).__name__})"
    for name, types in known.items():
        value = values.get(name) if isinstance(values, dict) else None
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            return f"has no {name} of a kind that a run writes"
    return None


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def check_version(checkpoint: Checkpoint) -> None:
    """Raises RunFolderError for a checkpoint of a newer version: going on from an older one would bury it."""
    if checkpoint.is_of_newer_version:
        raise RunFolderError(
            f"{checkpoint.path}: {checkpoint.problem}",
            expected="a checkpoint of this version or an older one",
            do="resume with the version that wrote it, or move the folder away",
        )


def check_origin(folder: Path, *, trusted: bool) -> None:
    """Raises RunFolderError for shards that others wrote: DeepSpeed and torch unpickle them without limits.

    Args:
        folder: of a checkpoint, or of weights.
        trusted: the user vouches for it, by `--trust_checkpoint`.
    """
    if trusted or not needs_trust(folder):
        return
    try:
        manifest = read_record(folder / MANIFEST)
        is_ours = is_signed_here(_digest_unsigned(manifest), manifest.get("signature"))
    except (OSError, ValueError, AttributeError, RecursionError):
        is_ours = False
    if not is_ours:
        raise RunFolderError(
            f"{folder} holds pickles, and no signature by the key in {find_key_file()}: another user or machine wrote "
            "it, or an earlier version of dpokit",
            expected="a checkpoint that you wrote here, or one that you trust as you trust a program",
            do="--trust_checkpoint true loads it; machines that share a folder DPOKIT_STATE share the key",
        )


def find_part(run: RunDir, step: int) -> Path:
    """Where this start of the run writes a checkpoint until it is whole."""
    return run.path / f".checkpoint-{step}.{run.token}.part"


def list_files(folder: Path) -> list[str]:
    """All files below a folder, by their relative names."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def describe_files(folder: Path, names: Iterable[str]) -> Files:
    """Size and sha256 of files, once they are on disk. Raises: OSError."""
    found = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            found[name] = {"size": os.fstat(file.fileno()).st_size, "sha256": _digest(file)}
    return found


def seal(run: RunDir, step: int, files: Files, facts: Mapping[str, Any]) -> Path:
    """Makes a part a checkpoint: its manifest, then its name. Rank 0 of the run that is in possession of the folder.

    Raises:
        RunFolderError: a later start of the run has taken the folder over.
        OSError: the disk.
    """
    part, path = find_part(run, step), run.path / f"checkpoint-{step}"
    for folder in {(part / name).parent for name in files}:
        sync_folder(folder)
    write_manifest(part, step, files, facts)
    sync_folder(part)
    if run.metrics_jsonl.exists():  # a step that is not computed again must be on disk, too
        with run.metrics_jsonl.open("rb") as metrics:
            os.fsync(metrics.fileno())
    run.check_possession()
    if not os.path.lexists(path):
        part.rename(path)
    else:  # killed between the two renames, the next start restores the former one
        former = path.with_name(f".{path.name}{REPLACED}")
        discard(former)
        path.rename(former)
        part.rename(path)
        discard(former)
    sync_folder(run.path)
    return path


def write_manifest(folder: Path, step: int, files: Files, facts: Mapping[str, Any]) -> None:
    """Says what the folder must hold, and how to tell that this is still what was said."""
    manifest = json.loads(json.dumps({"format": FORMAT, "step": step, **facts, "files": files}))
    manifest["signature"] = sign(_digest_unsigned(manifest))
    write_json(folder / MANIFEST, {**manifest, "sha256": _digest_manifest(manifest)})


def retire(run: RunDir, *, limit: int | None, best: Path | None) -> None:
    """Deletes what is not whole, and all but the newest `limit` whole ones; the newest and the best always stay.

    None, 0 and below are no limit, as in transformers.
    """
    found = find_checkpoints(run, deep=False)
    whole = [checkpoint for checkpoint in found if checkpoint.problem is None]
    kept = {checkpoint.path.resolve() for checkpoint in (whole[:limit] if limit is not None and limit > 0 else whole)}
    kept |= {best.resolve()} if best is not None else set()
    for checkpoint in found:
        is_spared = checkpoint.is_of_newer_version or checkpoint.is_unreadable
        if checkpoint.path.resolve() not in kept and not is_spared:
            discard(checkpoint.path)


def sweep_parts(run: RunDir) -> None:
    """Deletes what former starts of the run left unfinished."""
    for path in run.path.glob(".checkpoint-*.part"):
        discard(path)


def restore_replaced(run: RunDir) -> None:
    """Gives a checkpoint its name back where a start was killed while another one was to take it."""
    for former in run.path.glob(f".checkpoint-*{REPLACED}"):
        path = former.with_name(former.name.removeprefix(".").removesuffix(REPLACED))
        if os.path.lexists(path):
            discard(former)
        else:
            former.rename(path)


def discard(path: Path) -> None:
    """Deletes a checkpoint, its manifest first: interrupted, it is not whole. Of a link, the link alone."""
    if not path.is_symlink():
        (path / MANIFEST).unlink(missing_ok=True)
    remove_tree(path)


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return _digest(file)
    except OSError as error:
        return f"unreadable: {error.strerror}"


def _digest_unsigned(manifest: Mapping[str, Any]) -> str:
    return _digest_manifest({name: value for name, value in manifest.items() if name != "signature"})


def _digest_manifest(manifest: Mapping[str, Any]) -> str:
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _digest(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()
