"""Merges a run's weights into one safetensors model for `from_pretrained`, and records the measured drift."""

import fcntl
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftConfig

from dpokit.atomic_files import new_folder, read_record, sync_folder, write_json
from dpokit.checkpoint.store import describe_files, find_checkpoints, list_files
from dpokit.console import quiet_dependencies, say
from dpokit.data.rendering import Renderer
from dpokit.errors import ModelError, RunFolderError, SettingsError, find_disk_trouble
from dpokit.merge.drift import DriftCheck, check_drift
from dpokit.merge.find_weights import find_weights, follow_base, gather_weights
from dpokit.merge.hh_chat_template import write_template
from dpokit.merge.layers import check_adapter_file, is_quantised
from dpokit.merge.write import parse_size, read_whole_dtype, reload, write_model
from dpokit.model.base_and_tuned import add_prompt_format
from dpokit.model.load import find_base, load_tokenizer, name_model
from dpokit.model.reference import hash_weights
from dpokit.model.tuned_folder import DTYPES, complete_folder
from dpokit.rundir import RunDir, lost_folder_errors
from dpokit.settings.load import Settings, load_settings, read_run_settings

FORMAT = 1
PAIRS = 100  # held-out pairs of the drift check by default
MAX_SHARD_SIZE = "5GB"
PACKAGES = ("dpokit", "torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class MergeOptions:
    """Options of a merge.

    Attributes:
        dtype: of the merged weights; None for the run's `--dtype`, or without it the dtype of the base.
        max_shard_size: largest size of a weights file, in transformers' notation.
        dequantized_base: merge an adapter that was trained on 4 or 8 bits into the dequantised base, not the original.
        accept_drift: report a changed base, or drift beyond the bounds, instead of refusing it.
        limit: number of held-out pairs to score, from the first; None for all.
        checkpoint: step of a checkpoint to merge; None for the final weights.
        proof: whether to score held-out pairs before and after the merge.
    """

    dtype: str | None = None
    max_shard_size: str = MAX_SHARD_SIZE
    dequantized_base: bool = False
    accept_drift: bool = False
    limit: int | None = PAIRS
    checkpoint: int | None = None
    proof: bool = True


def merge_run(run: RunDir, options: MergeOptions | None = None, *, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Writes merged/ and returns the content of its merge.json. Only one process calls it.

    Needs memory for the model and one layer, also with the drift check. The folder appears only when it is complete.

    Args:
        run: the run folder.
        options: None for the defaults.
        argv: training flags that override the run's own.

    Raises: DpokitError: an error that the user can correct.
    """
    options = options or MergeOptions()
    quiet_dependencies()
    run.check_links()
    record = _check_run(run)
    with lost_folder_errors(run.path), _alone(run), _disk_troubles():
        _check_unmerged(run)
        settings = load_settings("merge", read_run_settings(add_prompt_format(run, record)), list(argv))
        _check_options(settings, options)
        fingerprint = _check_base(run, record, settings, accept=options.accept_drift)
        with new_folder(run.merged) as part:
            first_model = record["settings"].get("model_name_or_path", {}).get("value")
            made = _fill(part, run, settings, options, first_model=first_model)
            made |= {"model_fingerprint": fingerprint, "end": run.find_end()}
            made["files"] = describe_files(part, list_files(part))
            write_json(part / run.merge_json.name, made)
        sync_folder(run.path)
    say(f"the merged model is in {run.merged}")
    return made


def _fill(
    part: Path, run: RunDir, settings: Settings, options: MergeOptions, *, first_model: str | None
) -> dict[str, Any]:
    """Writes weights and tokenizer, checks the drift, and returns the record for merge.json.

    Args:
        first_model: name of the model that the run started from, as run.json records it.
    """
    weights = find_weights(run, step=options.checkpoint)
    with TemporaryDirectory(prefix=".gathered-", dir=part) as scratch:
        folder = gather_weights(weights, settings, scratch=Path(scratch))
        folder = follow_base(folder, settings, recorded=str(first_model), scratch=Path(scratch))
        model = name_model(settings, str(folder))
        base = find_base(model)
        adapter_sha256 = None if base is None else check_adapter_file(folder)
        tokenizer = load_tokenizer(model, trust_remote_code=settings.training.trust_remote_code)
        quantised = base is not None and is_quantised(settings)
        dequantised = quantised and options.dequantized_base
        check = None
        if options.proof:
            in_stored_dtype = _load_as_stored(settings, folder)
            check = DriftCheck(in_stored_dtype, folder, tokenizer=tokenizer, limit=options.limit)
        written = write_model(
            part,
            folder,
            settings,
            tokenizer,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            dequantised=dequantised,
        )
        tokenizer.save_pretrained(part)
        if settings.data.prompt_format != "raw":
            write_template(part, tokenizer)
        complete_folder(part, settings, Renderer(tokenizer).ends)
        method = "full" if base is None else _name_method(folder, quantised=quantised)
    gc.collect()  # frees the first model, which refers to itself, before the second is loaded
    merged = reload(part, written, trust_remote_code=settings.training.trust_remote_code)
    dtype = str(merged.dtype).removeprefix("torch.")
    made = {
        "format": FORMAT,
        "weights": weights.name,
        "method": method,
        "base": _describe_base(settings, base),
        "merged_into": None if base is None else "dequantised base" if dequantised else "base",
        "adapter_sha256": adapter_sha256,
        "dtype": dtype,
        "versions": {name: version(name) for name in PACKAGES},
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if check is None:
        return made | dict.fromkeys(
            ("pairs", "mean_drift", "largest_drift", "mean_rounding", "mean_shift", "accuracy_before", "accuracy_after")
        )
    drift = check.measure(merged)
    other_base = quantised and not dequantised
    return made | drift | check_drift(drift, dtype, other_base=other_base, accept=options.accept_drift)


def _load_as_stored(settings: Settings, folder: Path) -> Settings:
    """Returns settings that load a whole model in the dtype of its file, so that the check measures the merge alone."""
    stored = read_whole_dtype(folder)
    return settings if stored not in DTYPES else replace(settings, model=replace(settings.model, dtype=stored))


def _name_method(folder: Path, *, quantised: bool) -> str:
    config = PeftConfig.from_pretrained(folder)
    name = str(config.peft_type.value)
    if name == "LORA":
        name = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    return f"Q{name}" if quantised else name


def _describe_base(settings: Settings, base: str | None) -> dict[str, Any]:
    """Name and revision of the base; for a folder or file only its last name, because merged/ may be published."""
    name = base or str(settings.model.model_name_or_path)
    is_first = name == settings.model.model_name_or_path
    local = Path(name).exists()
    revision = None if local else settings.model.model_revision if is_first else "main"
    return {"name": Path(name).resolve().name if local else name, "revision": revision}


def _check_run(run: RunDir) -> dict[str, Any]:
    record = run.read_run()
    if record is None or not record.get("settings"):
        defect = "no run.json" if record is None else "its run.json has no settings"
        raise RunFolderError(
            f"{run.path} holds no run: {defect}",
            expected="the --output_dir of a trained run",
            do="correct the path",
        )
    return record


def _check_unmerged(run: RunDir) -> None:
    if not run.merged.exists():
        return
    try:
        made = read_record(run.merge_json)
        when = f", made {made['when']} from {made['weights']}"
    except (OSError, ValueError, KeyError, TypeError):
        when = ", without a readable merge.json"
    raise RunFolderError(
        f"{run.merged} exists already{when}",
        expected="a run that is not merged yet",
        do=f"delete {run.merged} to merge again, or use it as it is",
    )


def _check_options(settings: Settings, options: MergeOptions) -> None:
    if options.dtype is not None and options.dtype not in DTYPES:
        raise SettingsError(
            f"--dtype {options.dtype} is unknown", expected=", ".join(DTYPES), do="--dtype bfloat16, or leave it out"
        )
    if options.limit is not None and options.limit < 1:
        raise SettingsError(
            f"--limit is {options.limit}", expected="at least one pair", do="--limit 100, or --no-proof"
        )
    parse_size(options.max_shard_size)
    if options.dequantized_base and not is_quantised(settings):
        raise SettingsError(
            "--dequantized-base is set, but the run's base was not quantised",
            expected="a run with --load_in_4bit or --load_in_8bit",
            do="leave --dequantized-base out",
        )


def _check_base(run: RunDir, record: dict[str, Any], settings: Settings, *, accept: bool) -> str | None:
    """Returns the fingerprint of the model that the run started from. Raises: ModelError: the model has changed."""
    model = settings.model
    recorded = record.get("model_fingerprint")
    if recorded is None:  # a run of an earlier version has it only in its checkpoints
        manifests = [checkpoint.manifest or {} for checkpoint in find_checkpoints(run, deep=False)]
        recorded = next((manifest["settings"].get("model") for manifest in manifests if "settings" in manifest), None)
    try:
        present = hash_weights(str(model.model_name_or_path), model.model_revision)
    except (OSError, ModelError):
        return None  # loading the model will report why it cannot be read, if it is needed
    if recorded is not None and recorded != present:
        change = (
            f"{model.model_name_or_path} has changed since the run started from it: it was {recorded[:80]} and is now "
            f"{present[:80]}"
        )
        if not accept:
            raise ModelError(
                change,
                expected="the same weights and config, by their sha256 (a folder) or commit (a Hub id)",
                do="restore them, or name them by --model_name_or_path or --model_revision; or --accept-drift to merge "
                "with the present ones",
            )
        say(f"accepted: {change}")
    return present


@contextmanager
def _alone(run: RunDir) -> Iterator[None]:
    """Prevents a second merge of the run on this machine. Raises: RunFolderError: another merge is running."""
    folder = os.open(run.path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                f"{run.path} is being merged by another process",
                expected="one merge at a time",
                do="wait until it ends",
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(folder)


@contextmanager
def _disk_troubles() -> Iterator[None]:
    """Turns a full disk, or missing permissions, into a RunFolderError."""
    try:
        yield
    except Exception as error:  # of any library: tokenizers raise a bare Exception
        trouble = find_disk_trouble(error)
        if trouble is None:
            raise
        raise RunFolderError(
            f"{trouble.seen}; no merged model was kept",
            expected="space for the whole model beside the run's other files, and permission to write there",
            do="free some space, correct the permissions or move the run folder; then run the command again",
        ) from error


def describe_merge(made: dict[str, Any]) -> str:
    """A merge.json record as two lines of text."""
    title = f"{made['weights']} ({made['method']}) of {made['base']['name']}, {made['dtype']}"
    if made["merged_into"] == "dequantised base":
        title += ", into the dequantised base"
    if made["pairs"] is None:
        return f"{title}\nthe drift was not measured (--no-proof)"
    return (
        f"{title}\n{made['pairs']:,} held-out pairs, {made['tokens']:,} answer tokens: mean drift of a token "
        f"{made['mean_drift']:.2g} nats, largest {made['largest_drift']:.2g} (training changed "
        f"{made['mean_shift']:.2g}); "
        f"reward accuracy {made['accuracy_before']:.1%} before, {made['accuracy_after']:.1%} after"
    )
