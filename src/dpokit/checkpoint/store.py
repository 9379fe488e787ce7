"""Writes, verifies, finds and deletes checkpoints. Imports no torch.

    .checkpoint-N.TOKEN.part/   a checkpoint while it is written, by the start of the run that has this token
    .checkpoint-N.replaced/     the former checkpoint-N, while a new one takes its name
    checkpoint-N/               whole if all sizes and sha256 in manifest.json, and the manifest's own, are right

All files are on disk before the manifest is written, and the folder gets its name last. A folder that does not match
its manifest is never resumed from and does not count for `--save_total_limit`; the next checkpoint of its step replaces
it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from dpokit.atomic_files import apply_umask, read_record, remove_tree, sync_folder, write_json
from dpokit.checkpoint.origin import find_key_file, is_signed_here, sign_checkpoint
from dpokit.checkpoint.pickles import find_pickle_problem, needs_trust
from dpokit.errors import RunFolderError
from dpokit.rundir import RunDir

FORMAT = 1  # of the manifest; folders of a later format are neither read nor deleted
NEWER_VERSION = "it was written by a newer version"
MANIFEST = "manifest.json"
REPLACED = ".replaced"
Files = dict[str, dict[str, Any]]
MOST_PROCESSES = 100_000
NUMBER = (int, float)
# The values that a resume reads in these files, and their types.
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
            it is missing or unreadable. `weights_alone` is why it can be loaded but not resumed from, or None.
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
        return self.problem is not None and self.problem.startswith(NEWER_VERSION)


def find_checkpoints(run: RunDir, *, deep: bool) -> list[Checkpoint]:
    """All checkpoints of a run, newest first.

    Args:
        deep: read every byte and search every pickle; otherwise only names and sizes are compared.
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
        return "its manifest has changed since it was written (its sha256 differs)"
    if manifest["format"] > FORMAT:
        return f"{NEWER_VERSION} (format {manifest['format']}; this version reads up to {FORMAT})"
    if manifest["step"] != step:
        return f"its manifest is that of step {manifest['step']}"
    files: Files = manifest["files"]
    for name, entry in sorted(files.items()):
        file = path / name
        if not _is_inside(name):
            return f"its manifest names {name}, which is outside of the folder"
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            return f"{name} is missing"
        if size != entry["size"]:
            return f"{name} has {size:,} bytes, not {entry['size']:,}"
    for name, entry in sorted(files.items()) if deep else ():
        if _hash(path / name) != entry["sha256"]:
            return f"{name} has changed since it was written (its sha256 differs)"
    if deep and (reason := find_pickle_problem(path)) is not None:
        return f"it must not be loaded: {reason}"
    return _find_missing_state(path, step, manifest) if deep and manifest.get("weights_alone") is None else None


def _find_missing_state(path: Path, step: int, manifest: Mapping[str, Any]) -> str | None:
    """The part of a run's state that is missing or invalid, which a resume would silently reset; None if complete."""
    names, processes = list(manifest["files"]), manifest["world_size"]
    if type(processes) is not int or not 1 <= processes <= MOST_PROCESSES:
        return f"its manifest says that {processes} processes wrote it"
    random_state = "rng_state.pth" if processes == 1 else "rng_state_{}.pth"
    needed = {
        "trainer state": ["trainer_state.json"],
        "learning rate schedule": ["scheduler.pt"],
        "optimizer": ["optimizer.pt", "optimizer_*/.metadata", "global_step*/*_optim_states.pt"],
        **{f"random state of rank {rank}": [random_state.format(rank)] for rank in range(processes)},
        **{f"progress of rank {rank}": [f"progress_{rank}.json"] for rank in range(processes)},
    }
    for part, patterns in needed.items():
        if not any(fnmatch(name, pattern) for pattern in patterns for name in names):
            return f"it has no {part} ({patterns[0]})"
    types = {"trainer_state.json": TRAINER_STATE}
    types |= {f"progress_{rank}.json": PROGRESS for rank in range(processes)}
    for name, types_of_values in types.items():
        if (problem := _find_type_problem(path / name, types_of_values)) is not None:
            return f"{name} {problem}"
    saved_step = read_record(path / "trainer_state.json")["global_step"]
    return None if saved_step == step else f"trainer_state.json is of step {saved_step}"


def _find_type_problem(file: Path, types_of_values: Mapping[str, tuple[type, ...]]) -> str | None:
    """Why a file of state is unusable: unreadable, or a value missing or of a wrong type; None if it is usable."""
    try:
        values = read_record(file)
    except (ValueError, RecursionError) as error:
        return f"cannot be read ({type(error).__name__})"
    for name, types in types_of_values.items():
        value = values.get(name) if isinstance(values, dict) else None
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            return f"has no valid {name}"
    return None


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def check_version(checkpoint: Checkpoint) -> None:
    """Raises RunFolderError for a checkpoint of a newer version: a resume from an older one would repeat its steps."""
    if checkpoint.is_of_newer_version:
        raise RunFolderError(
            f"{checkpoint.path}: {checkpoint.problem}",
            expected="a checkpoint of this version or an older one",
            do="resume with the version of dpokit that wrote it, or move the folder away",
        )


def check_origin(folder: Path, *, trusted: bool) -> None:
    """Raises RunFolderError for shards that others wrote: DeepSpeed and torch unpickle them without restriction.

    Args:
        folder: of a checkpoint, or of weights.
        trusted: the user trusts it, by `--trust_checkpoint`.
    """
    if trusted or not needs_trust(folder):
        return
    try:
        manifest = read_record(folder / MANIFEST)
        is_signed = is_signed_here(_digest_unsigned(manifest), manifest.get("signature"))
    except (OSError, ValueError, AttributeError, RecursionError):
        is_signed = False
    if not is_signed:
        raise RunFolderError(
            f"{folder} holds pickles, and no signature by the key in {find_key_file()}: another user or machine wrote "
            "it, or an earlier version of dpokit",
            expected="a checkpoint that you wrote on this machine, or one that you trust as you trust a program",
            do="load it by --trust_checkpoint true; machines that share a folder DPOKIT_STATE share the key",
        )


def find_part(run: RunDir, step: int) -> Path:
    """The folder in which this start of the run writes a checkpoint until it is whole."""
    return run.path / f".checkpoint-{step}.{run.token}.part"


def list_files(folder: Path) -> list[str]:
    """All files below a folder, by their relative names."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def describe_files(folder: Path, names: Iterable[str]) -> Files:
    """Flushes files to disk, and returns the size and sha256 of each. Raises: OSError."""
    files = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            files[name] = {"size": os.fstat(file.fileno()).st_size, "sha256": _digest(file)}
    return files


def seal(run: RunDir, step: int, files: Files, facts: Mapping[str, Any]) -> Path:
    """Turns a part into a checkpoint: writes its manifest, then renames it; returns its folder. Rank 0 alone.

    Raises:
        RunFolderError: a later start of the run has taken over the folder.
        OSError: the disk is full, or fails.
    """
    part, path = find_part(run, step), run.path / f"checkpoint-{step}"
    apply_umask(part)
    for folder in {(part / name).parent for name in files}:
        sync_folder(folder)
    write_manifest(part, step, files, facts)
    sync_folder(part)
    if run.metrics_jsonl.exists():  # a resume computes no step up to this one again, so their metrics must be on disk
        with run.metrics_jsonl.open("rb") as metrics:
            os.fsync(metrics.fileno())
    run.check_possession()
    if not os.path.lexists(path):
        part.rename(path)
    else:  # if the process is killed between the two renames, the next start restores the former folder
        former = path.with_name(f".{path.name}{REPLACED}")
        discard(former)
        path.rename(former)
        part.rename(path)
        discard(former)
    sync_folder(run.path)
    return path


def write_manifest(folder: Path, step: int, files: Files, facts: Mapping[str, Any]) -> None:
    """Writes manifest.json: the folder's files, the facts, a signature, and the manifest's own sha256."""
    manifest = json.loads(json.dumps({"format": FORMAT, "step": step, **facts, "files": files}))
    manifest["signature"] = sign_checkpoint(_digest_unsigned(manifest))
    write_json(folder / MANIFEST, {**manifest, "sha256": _digest_manifest(manifest)})


def retire(run: RunDir, *, limit: int | None, best: Path | None) -> None:
    """Deletes checkpoints that are not whole, and whole ones beyond the newest `limit`; never the newest or the best.

    None, 0 and below mean no limit, as in transformers.
    """
    checkpoints = find_checkpoints(run, deep=False)
    whole = [checkpoint for checkpoint in checkpoints if checkpoint.problem is None]
    kept = {checkpoint.path.resolve() for checkpoint in (whole[:limit] if limit is not None and limit > 0 else whole)}
    kept |= {best.resolve()} if best is not None else set()
    for checkpoint in checkpoints:
        is_spared = checkpoint.is_of_newer_version or checkpoint.is_unreadable
        if checkpoint.path.resolve() not in kept and not is_spared:
            discard(checkpoint.path)


def sweep_parts(run: RunDir) -> None:
    """Deletes unfinished checkpoints of former starts of the run."""
    for path in run.path.glob(".checkpoint-*.part"):
        discard(path)


def restore_replaced(run: RunDir) -> None:
    """Renames a checkpoint back whose start was killed while it replaced the checkpoint by a new one."""
    for former in run.path.glob(f".checkpoint-*{REPLACED}"):
        path = former.with_name(former.name.removeprefix(".").removesuffix(REPLACED))
        if os.path.lexists(path):
            discard(former)
        else:
            former.rename(path)


def discard(path: Path) -> None:
    """Deletes a checkpoint, its manifest first: an interrupted deletion leaves no whole one. Follows no link."""
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
    values = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _digest(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()
