"""May this run begin here, and from where? Decided before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpokit.checkpoint.preempt import is_restarted
from dpokit.checkpoint.store import (
    Checkpoint,
    check_origin,
    check_version,
    find_checkpoints,
    look_at,
    restore_replaced,
    sweep_parts,
)
from dpokit.checkpoint.universal import convert_shards
from dpokit.console import say
from dpokit.errors import RunFolderError, SettingsError, find_disk_trouble
from dpokit.rundir import RunDir
from dpokit.settings.flag_facts import Fact, flags_with
from dpokit.settings.load import Settings

# Each kind of recipe knows its own. Pairs and global batch are compared beside them.
EXACT = flags_with(Fact.EXACT)
# What --accept_changes calls the rest.
GLOBAL_BATCH, MICRO_BATCH, DATA, MODEL = OTHERS = ("global_batch", "micro_batch", "data", "model")
SHORT = {"lr": "learning_rate", "batch": GLOBAL_BATCH}
# Losses defined on a micro-batch: for them its size is part of the loss.
OF_MICRO_BATCH = {"aot", "aot_unpaired", "sft"}


@dataclass
class Start:
    """Where a run begins.

    Attributes:
        token: of this start of the run.
        checkpoint: what to go on from; None for the beginning.
        manifest: the checkpoint's.
        accumulation: gradient accumulation steps that keep the global batch on this number of processes.
        universal: the checkpoint is ZeRO's, of another number of processes.
    """

    token: str
    checkpoint: Path | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    accumulation: int | None = None
    universal: bool = False


def claim_folder(run: RunDir, settings: Settings, *, world_size: int, placement: str) -> Start:
    """Makes the run folder this run's, and finds where it goes on. Rank 0.

    A folder with an unfinished run of the same recipe, model and data is resumed, from the newest checkpoint that
    verifies. A finished one is touched only with `--resume_from_checkpoint auto|PATH` or `--overwrite_run`, a foreign
    one only with the latter. A start by the launcher that began the run (`--max_restarts`) goes on with it, whatever
    the flags of the first start said.

    Raises:
        RunFolderError: the folder holds another or a finished run, or one that was begun otherwise; or it cannot be
            written.
        SettingsError: a resume path without a checkpoint, or flags that contradict each other.
    """
    asked, overwrite = settings.training.resume_from_checkpoint, settings.data.overwrite_run
    if overwrite and asked not in (None, "never"):
        raise SettingsError(
            f"overwrite_run deletes the run that resume_from_checkpoint {asked} would go on with",
            expected="one of the two",
            do="remove either flag",
        )
    if is_restarted(run):
        overwrite = False
        if asked == "never" or any(checkpoint.trouble is None for checkpoint in find_checkpoints(run, deep=False)):
            asked = None
    try:
        run.make()
        if overwrite:
            run.clear()
    except OSError as error:
        raise find_disk_trouble(error) or error from error
    _check_owner(run, settings, asked)
    restore_replaced(run)
    found = _find_checkpoint(run, asked)
    start = Start("")
    if found is not None:
        check_origin(found.path, trusted=settings.data.trust_checkpoint)
        start = _match(found, settings, world_size=world_size, placement=placement)
        say(f"resuming from {found.path}")
    start.token = run.take_possession(0 if found is None else found.step)
    sweep_parts(run)
    if start.universal and start.checkpoint is not None:
        convert_shards(start.checkpoint)
    return start


def _find_checkpoint(run: RunDir, asked: str | None) -> Checkpoint | None:
    if asked not in (None, "auto", "never"):
        return _check_path(run, Path(asked))
    if run.read_run() is None:
        return None
    for path in reversed(run.checkpoints()):  # older ones are read only where they are needed
        checkpoint = look_at(path, deep=True)
        check_version(checkpoint)
        if checkpoint.trouble is None:
            return checkpoint
        say(f"{checkpoint.path} is passed over: {checkpoint.trouble}")
    if asked == "auto" or run.checkpoints():
        say(f"{run.path} holds no checkpoint that can be used: starting from the beginning")
    return None


def _check_path(run: RunDir, path: Path) -> Checkpoint:
    expected = "auto, never, or a checkpoint-N folder that verifies"
    if not path.is_dir() or not path.name.rpartition("-")[2].isdigit():
        raise SettingsError(
            f"--resume_from_checkpoint {path}: there is no checkpoint", expected=expected, do="correct the path"
        )
    checkpoint = look_at(path, deep=True)
    check_version(checkpoint)
    if checkpoint.trouble is not None:
        raise SettingsError(
            f"--resume_from_checkpoint {path}: {checkpoint.trouble}", expected=expected, do="name another, or auto"
        )
    later = [other.name for other in run.checkpoints() if int(other.name.rpartition("-")[2]) > checkpoint.step]
    if later:
        raise RunFolderError(
            f"{run.path} holds {', '.join(later)}, later than {path.name}: going on from there would overwrite them",
            expected="the run's newest checkpoint, or another folder",
            do=f"--output_dir elsewhere to branch off from {path.name}, or delete the later ones",
        )
    return checkpoint


# -- what must match ---------------------------------------------------------------------------------------------------


def describe_identity(
    settings: Settings, *, world_size: int, data_fingerprint: str | None, model: str | None
) -> dict[str, Any]:
    """What a checkpoint keeps of its run, and a resume is compared with."""
    values, training = settings.values(), settings.training
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * world_size
    of_micro_batch = settings.kind == "dpo" and OF_MICRO_BATCH & set(training.loss_type)
    micro_batch = training.per_device_train_batch_size if of_micro_batch else None
    others = {GLOBAL_BATCH: batch, MICRO_BATCH: micro_batch, DATA: data_fingerprint, MODEL: model}
    return {name: values[name] for name in EXACT if name in values} | others


def _match(checkpoint: Checkpoint, settings: Settings, *, world_size: int, placement: str) -> Start:
    manifest = checkpoint.manifest or {}
    then = manifest["settings"]
    missing = sorted({*OTHERS} - {*then}) if isinstance(then, dict) else list(OTHERS)
    if missing:
        raise RunFolderError(
            f"{checkpoint.path}: the settings in its manifest lack {', '.join(missing)}",
            expected="the settings that its run began with",
            do="take another copy of the checkpoint, or delete it: an older one is taken then",
        )
    start = Start("", checkpoint.path, manifest)
    _check_placement(checkpoint, placement)
    start.universal = manifest["world_size"] != world_size and manifest["placement"].startswith("ZeRO")
    if manifest["world_size"] != world_size and GLOBAL_BATCH not in find_accepted(settings):
        start.accumulation = _keep_global_batch(then[GLOBAL_BATCH], settings, world_size)
        settings = settings.with_training("resume", gradient_accumulation_steps=start.accumulation)
    now = describe_identity(settings, world_size=world_size, data_fingerprint=then[DATA], model=then[MODEL])
    compare(then, now, settings)
    return start


def compare(then: Mapping[str, Any], now: Mapping[str, Any], settings: Settings) -> dict[str, list[Any]]:
    """Changes that were accepted: `{name: [then, now]}`. Raises: RunFolderError for all others together."""
    changed = {name: [then.get(name), value] for name, value in now.items() if then.get(name) != value}
    accepted = find_accepted(settings)
    refused = {name: both for name, both in changed.items() if name not in accepted}
    if refused:
        told = "; ".join(f"{name} was {before}, now {after}" for name, (before, after) in refused.items())
        raise RunFolderError(
            f"the run in {settings.training.output_dir} was begun otherwise: {told}",
            expected="the settings it was begun with, so that its steps are those of one run",
            do=f"set them back, accept the change by --accept_changes {','.join(refused)}, or begin a run in another "
            "--output_dir",
        )
    return changed


def find_accepted(settings: Settings) -> set[str]:
    """The names of `--accept_changes`. Raises: SettingsError for one that nothing is compared by."""
    words = ",".join(settings.data.accept_changes or []).replace(" ", ",").split(",")
    names = {SHORT.get(word, word) for word in words if word}
    known = {*EXACT, *OTHERS}
    if not names <= known:
        raise SettingsError(
            f"accept_changes names {', '.join(sorted(names - known))}, which no resume is compared by",
            expected=", ".join(sorted(known)),
            do="name the changed settings, separated by commas",
        )
    return names


def _check_placement(checkpoint: Checkpoint, placement: str) -> None:
    manifest = checkpoint.manifest or {}
    kinds = {"one device": "whole", "DDP": "whole"}
    before = kinds.get(manifest["placement"], manifest["placement"])
    after = kinds.get(placement, placement.removesuffix(" + CPU offload"))
    if before != after:
        raise RunFolderError(
            f"{checkpoint.path} was written by {manifest['placement']}, and this run is placed by {placement}",
            expected=manifest["placement"],
            do="start with the --config_file it was begun with",
        )


def _keep_global_batch(batch: int, settings: Settings, world_size: int) -> int:
    """Accumulation steps that keep it. Raises: RunFolderError, with the sizes that do."""
    training = settings.training
    each = training.per_device_train_batch_size * world_size
    if batch % each == 0:
        steps = batch // each
        if steps != training.gradient_accumulation_steps:
            say(f"gradient_accumulation_steps: {steps}, so that a step keeps its {batch} pairs")
        return steps
    fits = [size for size in range(1, batch // world_size + 1) if batch % (size * world_size) == 0]
    sizes = " or ".join(map(str, fits)) if fits else "none with this number of processes"
    raise RunFolderError(
        f"a step of this run has {batch} pairs, which {world_size} processes cannot deal in batches of "
        f"{training.per_device_train_batch_size}",
        expected="the same global batch on every number of processes",
        do=f"--per_device_train_batch_size {sizes}; or accept another batch by --accept_changes {GLOBAL_BATCH}",
    )


def _check_owner(run: RunDir, settings: Settings, asked: str | None) -> None:
    record = run.read_run()
    remedy = "choose another --output_dir, or delete what is there with --overwrite_run true"
    if record is None:
        if run.own_files():
            raise RunFolderError(
                f"{run.path} holds {run.own_files()[0].name}, but no run.json: it is not a run of this toolkit",
                expected="an empty or a new folder",
                do=remedy,
            )
        return
    if "recipe" not in record:  # lost before it wrote more than that it began
        return
    then = {name: record.get("settings", {}).get(name, {}).get("value") for name in flags_with(Fact.IDENTITY)}
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
            do=f"{remedy}; to train it further, raise the number of steps with --resume_from_checkpoint auto "
            "--accept_changes num_train_epochs (or max_steps)",
        )
    if asked == "never":
        raise RunFolderError(
            f"{run.path} holds an unfinished run, and resume_from_checkpoint is never",
            expected="an empty or a new folder",
            do=f"{remedy}; or go on with it: --resume_from_checkpoint auto",
        )
