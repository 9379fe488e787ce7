"""Decides, before anything is loaded, whether a run may start in a folder, and from which checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

from dpokit.checkpoint.preempt import is_restarted
from dpokit.checkpoint.store import (
    Checkpoint,
    check_checkpoint,
    check_origin,
    check_version,
    find_checkpoints,
    restore_replaced,
    sweep_parts,
)
from dpokit.checkpoint.universal import convert_shards
from dpokit.console import say
from dpokit.errors import RunFolderError, SettingsError, find_disk_trouble
from dpokit.run_starts import clear_folder, has_only_failed_starts, is_interrupted_by_another
from dpokit.rundir import RunDir
from dpokit.settings.flag_facts import Fact, flags_with
from dpokit.settings.flags import DataArguments
from dpokit.settings.load import Settings
from dpokit.settings.mixture import is_other

# Flags that a resume compares; each kind of recipe has some of them.
EXACT = flags_with(Fact.EXACT)
# The other compared values, by their names in --accept_changes.
GLOBAL_BATCH, MICRO_BATCH, DATA, MODEL = OTHERS = ("global_batch", "micro_batch", "data", "model")
SHORT = {"lr": "learning_rate", "batch": GLOBAL_BATCH}
# Losses that are defined on a micro-batch, so that its size changes their value.
OF_MICRO_BATCH = {"aot", "aot_unpaired", "sft"}


@dataclass
class Start:
    """Where a run starts.

    Attributes:
        token: of this start of the run.
        checkpoint: to resume from; None for step 0.
        manifest: of the checkpoint; empty without one.
        accumulation: gradient accumulation steps that keep the global batch with this number of processes; None to use
            those of the settings.
        universal: the checkpoint has ZeRO's shards of another number of processes.
        template_date: date that chat templates write; of a resumed run, the day of its first start.
    """

    token: str
    checkpoint: Path | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    accumulation: int | None = None
    universal: bool = False
    template_date: str = ""


def claim_folder(run: RunDir, settings: Settings, *, world_size: int, placement: str) -> Start:
    """Takes over the run folder for this start, and returns where it starts. Rank 0 alone.

    An unfinished run of the same recipe, model and data is resumed, from the newest checkpoint that verifies. A
    finished run is changed only with `--resume_from_checkpoint auto|PATH` or `--overwrite_run`, another run only with
    the latter. A restart by the launcher (`--max_restarts`) resumes its run, whatever the flags of its first start. A
    folder whose starts all ended before their first step is free for any run.

    Raises:
        RunFolderError: the folder holds another or a finished run, or one with other settings; or it is not writable.
        SettingsError: a resume path without a checkpoint, or flags that contradict each other.
    """
    requested, overwrite = settings.training.resume_from_checkpoint, settings.data.overwrite_run
    if overwrite and requested not in (None, "never"):
        raise SettingsError(
            f"overwrite_run deletes the run that resume_from_checkpoint {requested} would resume",
            expected="one of the two",
            do="remove either flag",
        )
    if is_restarted(run):
        overwrite = False
        checkpoints = find_checkpoints(run, deep=False)
        if requested == "never" or any(checkpoint.resume_problem is None for checkpoint in checkpoints):
            requested = None
    former_starts = 0
    try:
        run.make()
        if overwrite or _is_free(run, settings):
            former_starts = clear_folder(run)
    except OSError as error:
        raise find_disk_trouble(error) or error from error
    _check_owner(run, settings, requested)
    restore_replaced(run)
    checkpoint = _find_checkpoint(run, requested)
    start = Start("")
    if checkpoint is not None:
        check_origin(checkpoint.path, trusted=settings.data.trust_checkpoint)
        start = _check_settings(checkpoint, settings, world_size=world_size, placement=placement)
        say(f"resuming from {checkpoint.path}")
    # The run of the checkpoint, which may be in another folder.
    record = {} if checkpoint is None else RunDir(checkpoint.path.parent).read_run() or {}
    first_day = record.get("settings", {}).get("template_date", {}).get("value")
    start.template_date = settings.data.template_date or first_day or date.today().isoformat()
    if first_day and start.template_date != first_day:
        raise SettingsError(
            f"template_date is {start.template_date}, and the run began with {first_day}",
            expected=f"the same date in every prompt: {first_day}",
            do="leave out template_date",
        )
    start.token = run.take_possession(0 if checkpoint is None else checkpoint.step, former_starts=former_starts)
    sweep_parts(run)
    if start.universal and start.checkpoint is not None:
        convert_shards(start.checkpoint)
    return start


def _find_checkpoint(run: RunDir, requested: str | None) -> Checkpoint | None:
    """The checkpoint to resume from, every byte read; None for a start from step 0."""
    if requested not in (None, "auto", "never"):
        return _check_path(run, Path(requested))
    if run.read_run() is None:
        return None
    for path in reversed(run.checkpoints()):  # an older one is read only if all newer ones have problems
        checkpoint = check_checkpoint(path, deep=True)
        check_version(checkpoint)
        if checkpoint.resume_problem is None:
            return checkpoint
        say(f"{checkpoint.path} is skipped: {checkpoint.resume_problem}")
    if requested == "auto" or run.checkpoints():
        say(f"{run.path} holds no checkpoint that can be used: starting from step 0")
    return None


def _check_path(run: RunDir, path: Path) -> Checkpoint:
    """The checkpoint at the path of `--resume_from_checkpoint`. Raises: SettingsError, RunFolderError."""
    expected = "auto, never, or a checkpoint-N folder that verifies"
    if not path.is_dir() or not path.name.rpartition("-")[2].isdigit():
        raise SettingsError(
            f"--resume_from_checkpoint {path}: there is no checkpoint", expected=expected, do="correct the path"
        )
    checkpoint = check_checkpoint(path, deep=True)
    check_version(checkpoint)
    if checkpoint.resume_problem is not None:
        raise SettingsError(
            f"--resume_from_checkpoint {path}: {checkpoint.resume_problem}",
            expected=expected,
            do="name another, or auto",
        )
    later = [other.name for other in run.checkpoints() if int(other.name.rpartition("-")[2]) > checkpoint.step]
    if later:
        raise RunFolderError(
            f"{run.path} holds {', '.join(later)}, later than {path.name}: a resume from there would overwrite them",
            expected="the run's newest checkpoint, or another folder",
            do=f"continue from {path.name} in another --output_dir, or delete the later ones",
        )
    return checkpoint


# -- settings that must match ------------------------------------------------------------------------------------------


def describe_identity(
    settings: Settings, *, world_size: int, data_fingerprint: str | None, model: str | None
) -> dict[str, Any]:
    """The values that a checkpoint keeps of its run, to be compared by a resume."""
    values, training = settings.values(), settings.training
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * world_size
    of_micro_batch = settings.kind == "dpo" and OF_MICRO_BATCH & set(training.loss_type)
    micro_batch = training.per_device_train_batch_size if of_micro_batch else None
    others = {GLOBAL_BATCH: batch, MICRO_BATCH: micro_batch, DATA: data_fingerprint, MODEL: model}
    # Without an effect on other runs, so that these resume whatever it is.
    grouped = settings.kind == "dpo" and not settings.data.dataset_streaming and settings.data.group_by_prompt
    return {name: values[name] for name in EXACT if name in values} | {"group_by_prompt": grouped} | others


def _check_settings(checkpoint: Checkpoint, settings: Settings, *, world_size: int, placement: str) -> Start:
    """A start from the checkpoint, with the accumulation steps set. Raises: RunFolderError for settings that differ.

    Pairs and model are compared later, by `train.preflight.check_start`.
    """
    manifest = checkpoint.manifest or {}
    then = manifest["settings"]
    missing = sorted({*OTHERS} - {*then}) if isinstance(then, dict) else list(OTHERS)
    if missing:
        raise RunFolderError(
            f"{checkpoint.path}: the settings in its manifest lack {', '.join(missing)}",
            expected="the settings that its run was started with",
            do="take another copy of the checkpoint, or delete it to resume from an older one",
        )
    start = Start("", checkpoint.path, manifest)
    _check_placement(checkpoint, placement)
    start.universal = manifest["world_size"] != world_size and manifest["placement"].startswith("ZeRO")
    if manifest["world_size"] != world_size and GLOBAL_BATCH not in find_accepted(settings):
        start.accumulation = _keep_global_batch(then[GLOBAL_BATCH], settings, world_size)
        settings = settings.with_training("resume", gradient_accumulation_steps=start.accumulation)
    now = describe_identity(settings, world_size=world_size, data_fingerprint=then[DATA], model=then[MODEL])
    compare_settings(then, now, settings)
    return start


def compare_settings(then: Mapping[str, Any], now: Mapping[str, Any], settings: Settings) -> dict[str, list[Any]]:
    """The accepted changes, as `{name: [then, now]}`. Raises: RunFolderError that lists all other changes."""
    # Checkpoints from before these flags lack them. The fingerprint of the data shows whether their prompts were raw; a
    # stream has none, so a user has to say it.
    is_old = "prompt_format" not in then
    raw = {"prompt_format": now.get("prompt_format")} if then.get(DATA) is not None else {}
    newer = {flag.name: flag.default for flag in fields(DataArguments) if flag.name in EXACT}
    then = {**newer, "prompt_format": None, "group_by_prompt": False, **raw, **then}
    changed = {name: [then.get(name), value] for name, value in now.items() if is_other(name, then.get(name), value)}
    accepted = find_accepted(settings)
    refused = {name: both for name, both in changed.items() if name not in accepted}
    if refused:
        changes = "; ".join(f"{name} was {before}, now {after}" for name, (before, after) in refused.items())
        is_about_prompts = is_old and not refused.keys().isdisjoint((DATA, "prompt_format"))
        hint = "if it trained texts without a chat template, --prompt_format raw; else " if is_about_prompts else ""
        raise RunFolderError(
            f"the run in {settings.training.output_dir} was started with other settings: {changes}",
            expected="the settings of its first start, so that all its steps are those of one run",
            do=f"{hint}restore them, accept the change by --accept_changes {','.join(refused)}, or start a run in "
            "another --output_dir",
        )
    return changed


def find_accepted(settings: Settings) -> set[str]:
    """The names of `--accept_changes`, short ones in full. Raises: SettingsError for a name that no resume compares."""
    flag = ",".join(settings.data.accept_changes or []).replace(" ", ",").split(",")
    names = {SHORT.get(name, name) for name in flag if name}
    compared = {*EXACT, *OTHERS}
    if not names <= compared:
        raise SettingsError(
            f"accept_changes names {', '.join(sorted(names - compared))}, which no resume compares",
            expected=", ".join(sorted(compared)),
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
            f"{checkpoint.path} was written with {manifest['placement']}, and this run uses {placement}",
            expected=manifest["placement"],
            do="use the --config_file that the run was started with",
        )


def _keep_global_batch(batch: int, settings: Settings, world_size: int) -> int:
    """Accumulation steps that keep the global batch. Raises: RunFolderError that names batch sizes that keep it."""
    training = settings.training
    micro_step = training.per_device_train_batch_size * world_size  # pairs of all processes
    if batch % micro_step == 0:
        steps = batch // micro_step
        if steps != training.gradient_accumulation_steps:
            say(f"gradient_accumulation_steps: {steps}, so that a step still has {batch} pairs")
        return steps
    fits = [size for size in range(1, batch // world_size + 1) if batch % (size * world_size) == 0]
    sizes = " or ".join(map(str, fits)) if fits else "none with this number of processes"
    raise RunFolderError(
        f"a step of this run has {batch} pairs, which {world_size} processes cannot split into batches of "
        f"{training.per_device_train_batch_size}",
        expected="the same global batch with any number of processes",
        do=f"--per_device_train_batch_size {sizes}; or accept another batch by --accept_changes {GLOBAL_BATCH}",
    )


def _describe_run(settings: Settings) -> dict[str, Any]:
    """The recipe, the model and the data by which a folder's run is recognised."""
    model, data = settings.model.model_name_or_path, settings.data.dataset_name
    return {"recipe": settings.recipe, "model_name_or_path": model, "dataset_name": data}


def _describe_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """As `_describe_run`, of the run that a run.json describes."""
    then = {name: record.get("settings", {}).get(name, {}).get("value") for name in flags_with(Fact.IDENTITY)}
    return {"recipe": record.get("recipe"), **then}


def _is_free(run: RunDir, settings: Settings) -> bool:
    """Whether the folder holds only failed starts of another run; prints a line if it does."""
    record = run.read_run() or {}
    if "recipe" not in record or _describe_record(record) == _describe_run(settings):
        return False
    if is_interrupted_by_another(record) or not has_only_failed_starts(run):
        return False
    why = f" ({str(record['why']).splitlines()[0]})" if record.get("why") else ""
    say(f"{run.path} held only a start of another run that ended before its first step{why}: this run replaces it")
    return True


def _check_owner(run: RunDir, settings: Settings, requested: str | None) -> None:
    """Raises RunFolderError if the folder holds no run of this toolkit, another run, or one that may not be resumed."""
    record = run.read_run()
    remedy = "choose another --output_dir, or delete the folder's run with --overwrite_run true"
    if record is None:
        if run.own_files():
            raise RunFolderError(
                f"{run.path} holds {run.own_files()[0].name}, but no run.json: it is not a run of this toolkit",
                expected="an empty or a new folder",
                do=remedy,
            )
        return
    if "recipe" not in record:  # the process ended right after it had made the file
        return
    then, now = _describe_record(record), _describe_run(settings)
    if then != now:
        raise RunFolderError(
            f"{run.path} holds another run: recipe {then['recipe']}, model {then['model_name_or_path']}, "
            f"data {then['dataset_name']}",
            expected=f"recipe {now['recipe']}, model {now['model_name_or_path']}, data {now['dataset_name']}",
            do=remedy,
        )
    if record.get("state") == "finished" and requested in (None, "never"):
        raise RunFolderError(
            f"{run.path} holds a finished run",
            expected="an empty or a new folder",
            do=f"{remedy}; to train it further, raise the number of steps with --resume_from_checkpoint auto "
            "--accept_changes num_train_epochs (or max_steps)",
        )
    if requested == "never" and not has_only_failed_starts(run):
        raise RunFolderError(
            f"{run.path} holds an unfinished run, and resume_from_checkpoint is never",
            expected="an empty or a new folder",
            do=f"{remedy}; or resume it: --resume_from_checkpoint auto",
        )
