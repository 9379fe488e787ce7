"""What a run trained becomes one safetensors model that `from_pretrained` loads, with the measured drift beside it."""

import fcntl
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftConfig

from dpokit.checkpoint.store import describe_files, find_checkpoints, list_files
from dpokit.console import quiet_dependencies, say
from dpokit.errors import ModelError, RunFolderError, SettingsError, find_disk_trouble
from dpokit.merge.drift import Proof, check_drift
from dpokit.merge.find_weights import find_weights, follow_base, gather_weights
from dpokit.merge.hh_chat_template import write_template
from dpokit.merge.layers import check_adapter_file, is_quantised
from dpokit.merge.write import DTYPES, parse_size, reload, write_model
from dpokit.model.load import find_base, load_tokenizer, name_model
from dpokit.model.reference import hash_weights
from dpokit.rundir import RunDir, lost_folder_errors, new_folder, read_record, sync_folder, write_json
from dpokit.settings.load import Settings, load_settings, read_run_settings

FORMAT = 1
PAIRS = 100  # that the proof is made on, unless told otherwise
MAX_SHARD_SIZE = "5GB"
PACKAGES = ("dpokit", "torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class MergeOptions:
    """How a run is merged.

    Attributes:
        dtype: of the merged weights; None for the one that the run loaded its model in.
        max_shard_size: of a weights file, in transformers' words.
        dequantized_base: an adapter trained on 4 or 8 bits goes into what these left of the base, not into the base.
        accept_drift: a base that is another, and drift beyond the bound, are told and not refused.
        limit: of the held-out pairs, the first so many.
        checkpoint: the step of a checkpoint to merge; None for the final weights.
        proof: whether held-out pairs are scored before and after.
    """

    dtype: str | None = None
    max_shard_size: str = MAX_SHARD_SIZE
    dequantized_base: bool = False
    accept_drift: bool = False
    limit: int | None = PAIRS
    checkpoint: int | None = None
    proof: bool = True


def merge_run(run: RunDir, options: MergeOptions | None = None, *, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Writes merged/ and returns what its merge.json holds. One process; no collectives.

    It takes the memory of the model once and of one layer, the proof no more. The folder appears whole or not at all.

    Args:
        run: its folder.
        options: how; None for the defaults.
        argv: more training flags, over the run's own.

    Raises: DpokitError: what the user can mend.
    """
    options = options or MergeOptions()
    quiet_dependencies()
    run.check_links()
    record = _check_run(run)
    with lost_folder_errors(run.path), _alone(run), _disk_troubles():
        _check_unmerged(run)
        settings = load_settings("merge", read_run_settings(record), list(argv))
        _check_options(settings, options)
        fingerprint = _check_base(run, record, settings, accept=options.accept_drift)
        with new_folder(run.merged) as part:
            base_then = record["settings"].get("model_name_or_path", {}).get("value")
            made = _fill(part, run, settings, options, base_then=base_then)
            made |= {"model_fingerprint": fingerprint, "end": run.find_end()}
            made["files"] = describe_files(part, list_files(part))
            write_json(part / run.merge_json.name, made)
        sync_folder(run.path)
    say(f"the merged model is in {run.merged}")
    return made


def _fill(
    part: Path, run: RunDir, settings: Settings, options: MergeOptions, *, base_then: str | None
) -> dict[str, Any]:
    """Weights, tokenizer and proof; returns what merge.json says of them.

    Args:
        base_then: the model that the run began with, by its name of then.
    """
    found = find_weights(run, step=options.checkpoint)
    with TemporaryDirectory(prefix=".gathered-", dir=part) as room:
        folder = gather_weights(found, settings, room=Path(room))
        folder = follow_base(folder, settings, then=str(base_then), room=Path(room))
        asked = name_model(settings, str(folder))
        base = find_base(asked)
        adapter_sha256 = None if base is None else check_adapter_file(folder)
        tokenizer = load_tokenizer(asked, trust_remote_code=settings.training.trust_remote_code)
        quantised = base is not None and is_quantised(settings)
        dequantised = quantised and options.dequantized_base
        proof = Proof(settings, folder, tokenizer=tokenizer, limit=options.limit) if options.proof else None
        trained, written = write_model(
            part,
            folder,
            settings,
            tokenizer,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            dequantised=dequantised,
        )
        tokenizer.save_pretrained(part)
        write_template(part, tokenizer)
        method = "full" if base is None else _name_method(folder, quantised=quantised)
    gc.collect()  # models refer to themselves; two at once would not fit
    merged = reload(part, written, trust_remote_code=settings.training.trust_remote_code)
    dtype = str(merged.dtype).removeprefix("torch.")
    made = {
        "format": FORMAT,
        "weights": found.name,
        "method": method,
        "base": _describe_base(settings, base),
        "merged_into": None if base is None else "dequantised base" if dequantised else "base",
        "adapter_sha256": adapter_sha256,
        "dtype": dtype,
        "versions": {name: version(name) for name in PACKAGES},
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if proof is None:
        return made | dict.fromkeys(
            ("pairs", "mean_drift", "largest_drift", "mean_shift", "accuracy_before", "accuracy_after")
        )
    drift = proof.measure(merged)
    other_base = quantised and not dequantised
    return made | drift | check_drift(drift, (trained, dtype), other_base=other_base, accept=options.accept_drift)


def _name_method(folder: Path, *, quantised: bool) -> str:
    config = PeftConfig.from_pretrained(folder)
    name = str(config.peft_type.value)
    if name == "LORA":
        name = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    return f"Q{name}" if quantised else name


def _describe_base(settings: Settings, base: str | None) -> dict[str, Any]:
    """Name and revision; of a folder its name alone, as merged/ is made to be published."""
    name = base or str(settings.model.model_name_or_path)
    own = name == settings.model.model_name_or_path
    local = Path(name).is_dir()
    revision = None if local else settings.model.model_revision if own else "main"
    return {"name": Path(name).resolve().name if local else name, "revision": revision}


def _check_run(run: RunDir) -> dict[str, Any]:
    record = run.read_run()
    if record is None or not record.get("settings"):
        raise RunFolderError(
            f"{run.path} holds no run: {'no run.json' if record is None else 'its run.json has no settings'}",
            expected="the --output_dir of a run that was trained",
            do="correct the path",
        )
    return record


def _check_unmerged(run: RunDir) -> None:
    if not run.merged.exists():
        return
    try:
        made = read_record(run.merge_json)
        when = f", made {made['when']} of {made['weights']}"
    except (OSError, ValueError, KeyError, TypeError):
        when = ", and no merge.json that can be read"
    raise RunFolderError(
        f"{run.merged} is there already{when}",
        expected="a run that is not merged yet",
        do=f"delete {run.merged} to merge anew, or go on with it as it is",
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
            "--dequantized-base was given, but the run's base was not quantised",
            expected="a run with --load_in_4bit or --load_in_8bit",
            do="leave it out",
        )


def _check_base(run: RunDir, record: dict[str, Any], settings: Settings, *, accept: bool) -> str | None:
    """What the model that the run began with is known by. Raises: ModelError where it is another one now."""
    model = settings.model
    then = record.get("model_fingerprint")
    if then is None:  # a run of an earlier version: its checkpoints know
        manifests = [found.manifest or {} for found in find_checkpoints(run, deep=False)]
        then = next((manifest["settings"].get("model") for manifest in manifests if "settings" in manifest), None)
    try:
        now = hash_weights(str(model.model_name_or_path), model.model_revision)
    except OSError:
        return None  # where it is needed, loading it says why it cannot be
    if then is not None and then != now:
        told = f"{model.model_name_or_path} is not what the run began with: it was {then[:80]}, and is {now[:80]}"
        if not accept:
            raise ModelError(
                told,
                expected="the same weights and config, by their sha256 (a folder) or commit (a Hub id)",
                do="bring them back, or name them by --model_name_or_path or --model_revision; or --accept-drift to go "
                "on with what is there",
            )
        say(f"accepted: {told}")
    return now


@contextmanager
def _alone(run: RunDir) -> Iterator[None]:
    """No second merge of the run meanwhile, on this machine. Raises: RunFolderError where one is going on."""
    folder = os.open(run.path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                f"{run.path} is being merged by another process", expected="one merge at a time", do="wait for its end"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(folder)


@contextmanager
def _disk_troubles() -> Iterator[None]:
    """Turns a disk that is full, or not ours, into the user's message."""
    try:
        yield
    except Exception as error:  # of whatever library: tokenizers raise a bare Exception
        trouble = find_disk_trouble(error)
        if trouble is None:
            raise
        raise RunFolderError(
            f"{trouble.seen}; nothing was kept of the merged model",
            expected="room for the whole model beside the run's other files, and permission to write there",
            do="free some space or mend the permissions, or move the run folder, and run it again",
        ) from error


def describe(made: dict[str, Any]) -> str:
    """A merge in two lines."""
    what = f"{made['weights']} ({made['method']}) of {made['base']['name']}, {made['dtype']}"
    if made["merged_into"] == "dequantised base":
        what += ", into the dequantised base"
    if made["pairs"] is None:
        return f"{what}\nno proof was asked for"
    return (
        f"{what}\n{made['pairs']:,} held-out pairs, {made['tokens']:,} answer tokens: drift a token "
        f"{made['mean_drift']:.2g} nats in the mean, {made['largest_drift']:.2g} at most (training changed "
        f"{made['mean_shift']:.2g}); "
        f"reward accuracy {made['accuracy_before']:.1%} before, {made['accuracy_after']:.1%} after"
    )
